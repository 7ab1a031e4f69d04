//! One request: the filter decides, and what it allows is forwarded; the response, or the tunnel, goes
//! back to the client's connection. However it ends, it is logged.

mod access_log;
mod body;
mod connection_state;
pub(crate) mod dump;
mod filter;
mod headers;
mod tunnel;

use std::{convert::Infallible, rc::Rc};

use http_body_util::{Either, Full};
use hyper::body::{Body, Incoming};
use hyper::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HeaderValue, TRANSFER_ENCODING};
use hyper::{Request, Response, StatusCode, Version, http::request};
use serde_json::json;

use self::body::{Download, ResponseBody, Upload};
pub(crate) use self::connection_state::{ConnectionState, Peer};
use self::dump::{Dumper, Tap};
pub(crate) use self::filter::{Allowed, TOO_MANY_CONNECTIONS, USER_NOT_ALLOWED};
use self::{access_log::AccessLogEntry, filter::Route, tunnel::Tunnel};
use crate::upstream::{Kind, Upstream, drain_available};
use crate::{error::ErrorReply, log, shutdown::Shutdown};

/// A response to be forwarded, or the proxy's own instead.
type Outcome = Result<Response<ResponseBody>, ErrorReply>;

/// The state that all requests share.
pub(crate) struct Handler {
    pub(crate) upstream: Rc<Upstream>,
    pub(crate) allowed: Allowed,
    /// Writes dumps, with `--dump-dir`.
    pub(crate) dumper: Option<Dumper>,
    pub(crate) shutdown: Shutdown,
}

impl Handler {
    /// Responds to one request.
    pub(crate) async fn handle(
        &self,
        peer: Peer,
        state: &Rc<ConnectionState>,
        request: Request<Incoming>,
    ) -> Result<Response<ResponseBody>, Infallible> {
        let (head, mut body) = request.into_parts();
        let version = head.version;
        state.begin_request(version, body.is_end_stream());
        // hyper follows the chunks where there is a length, too: such a connection must be closed
        // (RFC 9112, section 6.1).
        let is_last = peer.denial.is_some()
            || version == Version::HTTP_10
            || head.headers.contains_key(TRANSFER_ENCODING);
        let route = filter::decide(&head, peer, self.allowed);
        let is_forwarded = matches!(route, Ok(Route::Forward(_)));
        // A client that waits for a 100 (Continue) has sent no body, and need not.
        if !is_forwarded && !is_last && !head.headers.contains_key(EXPECT) {
            drain_available(&mut body).await;
            state.set_request_complete(body.is_end_stream());
        }
        let outcome = match route {
            Ok(Route::Forward(kind)) => {
                let entry = Rc::new(AccessLogEntry::new(peer.uid));
                let upload = Upload {
                    body,
                    state: Rc::clone(state),
                    entry: Rc::clone(&entry),
                    tap: Tap(None),
                    stalled: None,
                };
                let outcome = self.forward(kind, head, upload).await;
                outcome.inspect_err(|reply| entry.fail(reply))
            }
            Ok(Route::Shutdown) => {
                log!("stopping: GET /shutdown by uid={}", log::uid(peer.uid));
                self.shutdown.trigger();
                Ok(Response::new(Either::Left(Full::default())))
            }
            Err(reply) => {
                log::rejection(peer.uid, reply.status.as_u16(), reply.message);
                Err(reply)
            }
        };
        let mut response = outcome.unwrap_or_else(|reply| reply.response().map(Either::Left));
        if matches!(response.body(), Either::Left(_)) {
            state.begin_wait();
        }
        *response.version_mut() = version;
        if is_last || !state.is_request_complete() || self.shutdown.is_triggered() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        Ok(response)
    }

    /// Forwards a request with this body.
    async fn forward(&self, kind: Kind, head: request::Parts, mut upload: Upload) -> Outcome {
        let (state, entry) = (Rc::clone(&upload.state), Rc::clone(&upload.entry));
        let exchange = self.dumper.as_ref().map(Dumper::next_exchange);
        let begin = exchange.as_ref();
        let start = || json!({ "method": head.method.as_str(), "url": head.uri.to_string() });
        upload.tap.0 = begin.and_then(|begin| begin("request", start(), &head.headers));
        let host = self.upstream.connector.target.host_header.clone();
        let headers = headers::for_upstream(head.headers, host, kind);
        let (connection, response) = self.upstream.send(kind, headers, Box::pin(upload)).await?;
        let (mut head, body) = response.into_parts();
        let status = head.status.as_u16();
        entry.status.set(status);
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            let message = "the upstream switched protocols before the request's end (protocol)";
            let upgraded = connection.into_upgraded().await;
            let upstream = upgraded.ok_or(ErrorReply::bad_gateway(message))?;
            state.set_tunnel(Tunnel { upstream, entry });
            head.headers = headers::end_to_end(head.headers, &[CONTENT_LENGTH]);
            headers::switch_protocol(&mut head.headers);
            return Ok(Response::from_parts(head, Either::Left(Full::default())));
        }
        let start = || json!({ "status": status });
        let dump = begin.and_then(|begin| begin("response", start(), &head.headers));
        head.headers = headers::end_to_end(head.headers, &[]);
        let mut download = Download {
            body,
            connection: Some((Rc::clone(&self.upstream), connection)),
            state,
            entry,
            tap: Tap(dump),
            deferred_error: None,
        };
        download.release_at_end(download.body.is_end_stream());
        Ok(Response::from_parts(head, Either::Right(download)))
    }
}

#[cfg(test)]
impl Handler {
    /// In front of this upstream, with a key of its own.
    pub(crate) fn for_tests(url: &str) -> Rc<Self> {
        let target = crate::upstream::target::Target::parse(url).unwrap();
        let connector =
            crate::upstream::Connector::new(target, None, rustls::RootCertStore::empty());
        let mut key: &[u8] = b"sk-key\n";
        let read = |buffer: &mut [u8]| std::io::Read::read(&mut key, buffer);
        let rule = crate::key::KeyRule::OPENAI;
        let credential = crate::key::Credential::read(rule, read).unwrap();
        Rc::new(Self {
            upstream: Rc::new(Upstream::new(connector, credential)),
            allowed: Allowed::default(),
            dumper: None,
            shutdown: Shutdown::default(),
        })
    }
}
