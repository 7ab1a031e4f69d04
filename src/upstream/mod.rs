//! The upstream: a request goes out with the credential added, and its response comes back with the
//! [`UpstreamConnection`] that it arrives on.

mod authorizing_stream;
mod connect_tunnel;
mod connection;
mod connector;
pub(crate) mod outbound_proxy;
mod pool;
pub(crate) mod target;
pub(crate) mod trusted_roots;

use std::{iter::from_fn, rc::Rc};

use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderMap, HeaderName, TRANSFER_ENCODING, UPGRADE};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::task::yield_now;

use self::authorizing_stream::RequestPrefix;
pub(crate) use self::connection::{BodyError, RequestBody, UpstreamConnection};
pub(crate) use self::connector::{Connector, Io, Stream};
use self::pool::Pool;
use crate::{error::ErrorReply, key::Credential};

/// The kinds of requests that are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A request with a body, whose response has one.
    Post,
    /// A WebSocket handshake (RFC 6455, section 4.1).
    Handshake,
}

impl Kind {
    /// The method that stands in the request line.
    pub(crate) fn method(self) -> Method {
        match self {
            Self::Post => Method::POST,
            Self::Handshake => Method::GET,
        }
    }
}

/// The upstream and its pooled connections.
pub(crate) struct Upstream {
    pub(crate) connector: Connector,
    prefix: Rc<RequestPrefix>,
    pool: Pool,
}

impl Upstream {
    pub(crate) fn new(connector: Connector, credential: Credential) -> Self {
        let prefix = RequestPrefix::new(&connector.target.origin_form, credential);
        Self {
            connector,
            prefix: Rc::new(prefix),
            pool: Pool::new(),
        }
    }

    /// Does what the first connection would otherwise wait for, then drops expired connections. Never
    /// returns.
    pub(crate) async fn maintain(self: Rc<Self>) {
        self.connector.seed_rng();
        self.pool.evict_expired().await;
    }

    /// Sends a request on a pooled connection or a new one and waits for the head of its response.
    ///
    /// A request is never sent again once any of it was sent: it is not idempotent (RFC 9110, section
    /// 9.2.2).
    pub(crate) async fn send(
        &self,
        kind: Kind,
        headers: HeaderMap,
        body: RequestBody,
    ) -> Result<(UpstreamConnection, Response<Incoming>), ErrorReply> {
        let mut request = Request::new(body);
        *request.method_mut() = kind.method();
        *request.uri_mut() = self.connector.target.origin_form.clone();
        *request.headers_mut() = headers;
        loop {
            let pooled = from_fn(|| self.pool.acquire()).find(|pooled| pooled.is_idle());
            let (mut connection, is_pooled) = match pooled {
                Some(connection) => (connection, true),
                // Boxed, so that only requests that connect have its memory.
                None => match Box::pin(self.connector.connect()).await {
                    Ok(stream) => (UpstreamConnection::new(stream, &self.prefix).await?, false),
                    Err(reply) => {
                        drain_available(request.body_mut()).await;
                        return Err(reply);
                    }
                },
            };
            match connection.send(kind, request).await {
                _ if connection.exceeds_interim() => {
                    let message = "the upstream sent more than 32 interim responses (protocol)";
                    return Err(ErrorReply::bad_gateway(message));
                }
                Ok(mut response) => {
                    check_framing(kind, &mut response)?;
                    return Ok((connection, response));
                }
                Err(mut error) => match error.take_message() {
                    // The pooled connection has been closed.
                    Some(unsent) if is_pooled => request = unsent,
                    _ => return Err(error.into_error().into()),
                },
            }
        }
    }

    /// Pools a connection whose response is complete, if it can be used again.
    pub(crate) fn release(&self, connection: UpstreamConnection) {
        if connection.is_idle() {
            self.pool.release(connection);
        }
    }
}

/// Reads what has arrived of a request's body that is not forwarded. If that is all of it, the client's
/// connection can be used again.
pub(crate) async fn drain_available(mut body: impl Body + Unpin) {
    /// Polling a body only makes hyper want more of it. Its dispatcher reads from the socket when the
    /// connection is polled next (`poll_read`), which is while this yields.
    const POLLS: usize = 2;
    for _ in 0..POLLS {
        let read = async { while let Some(Ok(_)) = body.frame().await {} };
        tokio::select! { biased; () = read => {} () = yield_now() => {} }
    }
}

/// Whether a message has this header once, with this value; `None` if it has none. Neither transfer codings nor
/// protocols are told apart by case (RFC 9112, section 7, and RFC 6455, section 4.2.1).
pub(crate) fn is_only(headers: &HeaderMap, name: HeaderName, value: &str) -> Option<bool> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.as_bytes();
    Some(first.eq_ignore_ascii_case(value.as_bytes()) && values.next().is_none())
}

/// Rejects a response whose framing is not forwarded as it is.
fn check_framing(kind: Kind, response: &mut Response<Incoming>) -> Result<(), ErrorReply> {
    let is_http_11 = response.version() == Version::HTTP_11;
    let is_switch = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let is_tunnel = kind == Kind::Handshake
        && is_http_11
        && is_only(response.headers(), UPGRADE, "websocket") == Some(true);
    let message = match is_only(response.headers(), TRANSFER_ENCODING, "chunked") {
        _ if is_switch && is_tunnel => return Ok(()),
        _ if is_switch => "the upstream switched to a protocol that was not requested (protocol)",
        None => return Ok(()),
        Some(true) if is_http_11 => {
            // Chunks take precedence over a length (RFC 9112, section 6.3).
            response.headers_mut().remove(CONTENT_LENGTH);
            return Ok(());
        }
        _ => "the upstream's response has a transfer coding other than chunked (protocol)",
    };
    Err(ErrorReply::bad_gateway(message))
}
