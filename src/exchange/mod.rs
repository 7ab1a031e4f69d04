//! One request: the filter decides, and what it allows is forwarded; the response, or the tunnel, goes
//! back to the client's connection. However it ends, it is logged.

mod access_log;
mod body;
mod connection_state;
pub(crate) mod dump;
mod filter;
mod headers;
mod tunnel;

use std::rc::Rc;

use http_body_util::Either;
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HeaderValue, TRANSFER_ENCODING};
use hyper::http::{request, response};
use hyper::{Request, Response, StatusCode, Version};
use serde_json::json;

use self::access_log::AccessLogEntry;
use self::body::{Download, ResponseBody, Upload};
pub(crate) use self::connection_state::{ConnectionState, Peer};
use self::dump::Dumper;
use self::filter::Route;
pub(crate) use self::filter::{Allowed, TOO_MANY_CONNECTIONS, USER_NOT_ALLOWED};
use self::tunnel::Tunnel;
use crate::error::ErrorReply;
use crate::log;
use crate::shutdown::Shutdown;
use crate::upstream::{Kind, Upstream, UpstreamConnection, drain_available};

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
        state: Rc<ConnectionState>,
        request: Request<Incoming>,
    ) -> Response<ResponseBody> {
        let (head, mut body) = request.into_parts();
        let version = head.version;
        state.begin_request(version, &body);
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
        let mut response = match route {
            Ok(Route::Forward(kind)) => self.forward(peer, &state, kind, head, body).await,
            Ok(Route::Shutdown) => {
                log!("stopping: GET /shutdown by uid={}", log::uid(peer.uid));
                self.shutdown.trigger();
                Response::new(Either::Left(Bytes::new().into()))
            }
            Err(reply) => {
                log::rejection(peer.uid, reply.status.as_u16(), reply.message);
                reply.response().map(Either::Left)
            }
        };
        *response.version_mut() = version;
        if is_last || !state.is_request_complete() || self.shutdown.is_triggered() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        response
    }

    async fn forward(
        &self,
        peer: Peer,
        state: &Rc<ConnectionState>,
        kind: Kind,
        head: request::Parts,
        body: Incoming,
    ) -> Response<ResponseBody> {
        let dump = self
            .dumper
            .as_ref()
            .map(|dumper| (dumper, dumper.next_name()));
        let tap = dump.as_ref().map(|(dumper, name)| {
            let start = json!({ "method": head.method.as_str(), "url": head.uri.to_string() });
            dumper.begin(&format!("{name}-request.json"), start, &head.headers)
        });
        let entry = Rc::new(AccessLogEntry::new(peer.uid));
        let upload = Upload {
            body,
            state: Rc::clone(state),
            entry: Rc::clone(&entry),
            tap,
            stalled: None,
        };
        let host = self.upstream.connector.target.host_header.clone();
        let headers = headers::for_upstream(head.headers, host, kind);
        let outcome = self.upstream.send(kind, headers, Box::pin(upload)).await;
        let (connection, response) = match outcome {
            Ok(response) => response,
            Err(reply) => return fail(&reply, &entry),
        };
        let (mut head, body) = response.into_parts();
        entry.status.set(head.status.as_u16());
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return switch(state, connection, head, entry).await;
        }
        let tap = dump.map(|(dumper, name)| {
            let start = json!({ "status": head.status.as_u16() });
            dumper.begin(&format!("{name}-response.json"), start, &head.headers)
        });
        head.headers = headers::end_to_end(head.headers, &[]);
        let mut download = Download {
            body,
            upstream: Rc::clone(&self.upstream),
            connection: Some(connection),
            state: Rc::clone(state),
            entry,
            tap,
            deferred_error: None,
        };
        download.complete_if_end_of_stream();
        Response::from_parts(head, Either::Right(download))
    }
}

/// The response to a handshake that the upstream accepted.
async fn switch(
    state: &ConnectionState,
    connection: UpstreamConnection,
    mut head: response::Parts,
    entry: Rc<AccessLogEntry>,
) -> Response<ResponseBody> {
    let Some((upstream, early)) = connection.into_upgraded().await else {
        let message = "the upstream switched protocols before it had the whole request (protocol)";
        return fail(&ErrorReply::bad_gateway(message), &entry);
    };
    state.set_tunnel(Tunnel {
        upstream,
        early,
        entry,
    });
    head.headers = headers::end_to_end(head.headers, &[CONTENT_LENGTH]);
    headers::switch_protocol(&mut head.headers);
    Response::from_parts(head, Either::Left(Bytes::new().into()))
}

/// Names the step that failed. The detail is for the log.
fn fail(reply: &ErrorReply, entry: &AccessLogEntry) -> Response<ResponseBody> {
    entry.status.set(reply.status.as_u16());
    let error = format!("{}: {}", reply.message, reply.detail);
    entry.error.replace(Some(error.into()));
    reply.response().map(Either::Left)
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
