//! A CONNECT tunnel through the outbound proxy (RFC 9110, section 9.3.6).

use std::{error::Error, future::poll_fn, pin::pin};

use http_body_util::Empty;
use hyper::header::{HOST, PROXY_AUTHORIZATION};
use hyper::{Request, Uri, body::Bytes, client::conn::http1};
use hyper_util::client::{legacy::connect::HttpConnector, proxy::matcher::Intercept};
use tokio::net::TcpStream;
use tower_service::Service;

/// Connects to `proxy` and requests a tunnel to `origin`, an `https` URL. Any 2xx opens it; for other
/// responses the error names the status.
pub(super) async fn open_tunnel(
    mut http: HttpConnector,
    proxy: &Intercept,
    origin: &Uri,
) -> Result<TcpStream, Box<dyn Error>> {
    let host = origin.host().unwrap_or_default();
    let authority = format!("{host}:{}", origin.port_u16().unwrap_or(443));
    let mut request = Request::connect(&authority).header(HOST, &authority);
    if let Some(authorization) = proxy.basic_auth() {
        request = request.header(PROXY_AUTHORIZATION, authorization);
    }
    let request = request.body(Empty::<Bytes>::new())?;
    let stream = http.call(proxy.uri().clone()).await?;
    let (mut sender, mut connection) = http1::handshake(stream).await?;
    let mut response = pin!(sender.send_request(request));
    let response = poll_fn(|cx| {
        // An error is also that of the response.
        let _ = connection.poll_without_shutdown(cx);
        response.as_mut().poll(cx)
    });
    let status = response.await?.status();
    let parts = connection.into_parts();
    match status.is_success() {
        true if parts.read_buf.is_empty() => Ok(parts.io.into_inner()),
        // In TLS, the client sends first.
        true => Err("the proxy sent unsolicited data".into()),
        false => Err(format!("the proxy responded with status {status}").into()),
    }
}
