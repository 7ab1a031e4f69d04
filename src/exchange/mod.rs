//! One exchange: a request comes in with whose it is, and is decided on; what may pass goes up, and its
//! answer leaves. Whatever happens, it is logged.

mod access_log;
mod body;
mod connection_state;
pub mod dump;
mod filter;
mod headers;
mod refusal;
mod tunnel;

use std::rc::Rc;

use http_body_util::Either;
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HeaderValue, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::http::response;
use hyper::{Request, Response, StatusCode, Version};
use serde_json::json;

use self::access_log::AccessLogEntry;
use self::body::Upload;
pub use self::body::{Download, ResponseBody};
pub use self::connection_state::{ConnectionState, Peer};
use self::dump::Dumper;
pub use self::filter::Allowed;
use self::filter::Wanted;
use self::tunnel::Tunnel;
use crate::failure::Failure;
use crate::log;
use crate::stop::Stop;
use crate::upstream::{self, Kind, Upstream, UpstreamConnection};

/// What all exchanges have in common.
pub struct Proxy {
    /// Where requests go.
    pub upstream: Rc<Upstream>,
    /// What may pass or be asked for beside `POST`.
    pub allowed: Allowed,
    /// Writes exchanges to files, where that is asked for.
    pub dumper: Option<Dumper>,
    /// Begins the end.
    pub stop: Stop,
}

impl Proxy {
    /// Answers one request.
    pub async fn answer(
        &self,
        peer: Peer,
        state: Rc<ConnectionState>,
        request: Request<Incoming>,
    ) -> Response<ResponseBody> {
        let (head, mut body) = request.into_parts();
        let version = head.version;
        state.begin_request(version, &body);
        // hyper follows the chunks where there is a length, too: such a connection must not go on
        // (RFC 9112, section 6.1).
        let is_last = peer.is_denied
            || version == Version::HTTP_10
            || head.headers.contains_key(TRANSFER_ENCODING);
        let mut response = match filter::decide(&head, peer, self.allowed) {
            Ok(Wanted::Forward(kind)) => self.forward(peer, &state, kind, head, body).await,
            decision => {
                // Who waits for a 100 (Continue) has sent nothing, and need not.
                if !is_last && !head.headers.contains_key(EXPECT) {
                    upstream::discard(&mut body).await;
                    state.set_request_complete(body.is_end_stream());
                }
                self.end_here(decision.err(), &log::uid(peer.uid))
            }
        };
        *response.version_mut() = version;
        if is_last || !state.is_request_complete() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        response
    }

    /// Refuses a request, or ends the program.
    fn end_here(&self, refusal: Option<Failure>, uid: &str) -> Response<ResponseBody> {
        let Some(refusal) = refusal else {
            log::line(format_args!("stopping: GET /shutdown by uid={uid}"));
            self.stop.begin();
            return Response::new(Either::Left(Bytes::new().into()));
        };
        let (status, reason) = (refusal.status.as_u16(), refusal.message);
        log::line(format_args!(
            "refused uid={uid} status={status} reason={reason:?}"
        ));
        refusal::response(&refusal)
    }

    async fn forward(
        &self,
        peer: Peer,
        state: &Rc<ConnectionState>,
        kind: Kind,
        head: Parts,
        body: Incoming,
    ) -> Response<ResponseBody> {
        let dumper = self.dumper.as_ref();
        let dump = dumper.map(|dumper| (dumper, dumper.next_name()));
        let tap = dump.as_ref().map(|(dumper, name)| {
            let about = json!({ "method": head.method.as_str(), "url": head.uri.to_string() });
            dumper.begin(&format!("{name}-request.json"), about, &head.headers)
        });
        let entry = Rc::new(AccessLogEntry::new(peer.uid));
        let upload = Upload {
            body,
            state: Rc::clone(state),
            entry: Rc::clone(&entry),
            tap,
            stalled: None,
        };
        let host = self.upstream.target.host_header.clone();
        let headers = headers::for_upstream(head.headers, host, kind);
        let outcome = self.upstream.send(kind, headers, Box::pin(upload)).await;
        let (connection, response) = match outcome {
            Ok(response) => response,
            Err(failure) => return fail(&failure, &entry),
        };
        let (mut head, body) = response.into_parts();
        entry.status.set(head.status.as_u16());
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            return switch(state, connection, head, entry).await;
        }
        let tap = dump.map(|(dumper, name)| {
            let about = json!({ "status": entry.status.get() });
            dumper.begin(&format!("{name}-response.json"), about, &head.headers)
        });
        head.headers = headers::end_to_end(head.headers, &[]);
        let mut download = Download {
            body,
            upstream: Rc::clone(&self.upstream),
            connection: Some(connection),
            flush: state.flush.clone(),
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
        return fail(&Failure::no_answer(message), &entry);
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

/// The step that failed, in plain words; the rest is logged.
fn fail(failure: &Failure, entry: &AccessLogEntry) -> Response<ResponseBody> {
    entry.status.set(failure.status.as_u16());
    let error = format!("{}: {}", failure.message, failure.detail);
    entry.error.replace(Some(error));
    refusal::response(failure)
}

#[cfg(test)]
impl Proxy {
    /// In front of this upstream, with a key of its own.
    pub(crate) fn for_tests(url: &str) -> Rc<Self> {
        let target = upstream::target::Target::parse(url).unwrap();
        let connector = upstream::Connector::new(&target, None, None).unwrap();
        let mut key: &[u8] = b"sk-key\n";
        let read = |buffer: &mut [u8]| std::io::Read::read(&mut key, buffer);
        let rule = crate::key::KeyRule::OPENAI;
        let credential = crate::key::Credential::read(rule, read).unwrap();
        Rc::new(Self {
            upstream: Rc::new(Upstream::new(target, connector, credential)),
            allowed: Allowed::default(),
            dumper: None,
            stop: Stop::default(),
        })
    }
}
