//! One exchange: a client's request, decided on, forwarded, and its answer on the way back.

use std::rc::Rc;

use hyper::body::{Bytes, Incoming};
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode};
use tokio::net::TcpStream;

use crate::body::{Relay, RequestBody, RequestState, ResponseBody};
use crate::connector::{ConnectError, with_sources};
use crate::dump::Dumper;
use crate::filter::{self, Decision};
use crate::framing::Findings;
use crate::link::ExchangeError;
use crate::log::{self, Record, Uid};
use crate::outgoing::{Opening, Outgoing};
use crate::peer::PeerCheck;
use crate::refusal::{Refusal, error_response};
use crate::stop::Stop;
use crate::upstream::{Upstream, UpstreamError};

/// What is known of who is at the other end of a connection.
#[derive(Clone, Copy, Default)]
pub struct Client {
    /// The uid of the process there, where it was asked for.
    pub uid: Option<u32>,
    /// Whether that user may not be served.
    pub is_refused: bool,
}

/// What all exchanges have in common.
pub struct Proxy {
    /// What requests to the upstream begin with.
    pub opening: Rc<Opening>,
    /// The connections that they go over.
    pub upstream: Rc<Upstream>,
    /// Whether `GET /shutdown` ends the process.
    pub http_shutdown: bool,
    /// Who may come in, unless everybody may.
    pub peer_check: Option<PeerCheck>,
    /// Writes exchanges to files, where that is asked for.
    pub dumper: Option<Dumper>,
    /// Begins the end.
    pub stop: Rc<Stop>,
}

impl Proxy {
    /// Finds out who a new client is and whether it may be served.
    pub async fn admit(&self, stream: &TcpStream) -> Client {
        let Some(check) = &self.peer_check else {
            return Client::default();
        };
        let (uid, is_allowed) = check.admit(stream).await;
        Client {
            uid,
            is_refused: !is_allowed,
        }
    }

    /// Answers one request, in whose head `findings` were made; `state` is that of its body.
    pub async fn answer(
        &self,
        client: Client,
        findings: Findings,
        request: Request<Incoming>,
        state: Rc<RequestState>,
    ) -> Response<ResponseBody> {
        let (head, body) = request.into_parts();
        let response = match self.decide(&head, client, findings) {
            Decision::Forward => return self.forward(client.uid, head, body, state).await,
            Decision::Refuse(refusal) => refuse(client.uid, refusal),
            Decision::Shutdown => {
                log::line(format_args!(
                    "stopping: GET /shutdown by uid={}",
                    Uid(client.uid)
                ));
                self.stop.begin();
                Response::new(ResponseBody::Own(Bytes::new()))
            }
        };
        RequestBody::new(body, state, None).discard().await;
        response
    }

    fn decide(&self, head: &Parts, client: Client, findings: Findings) -> Decision {
        if client.is_refused {
            let message = "this user may not use this proxy, or its connection was closed too early to tell whose it is";
            return Decision::Refuse(Refusal::forbidden("user_not_allowed", message));
        }
        if findings.two_framings {
            let message = "a request has a Content-Length or a Transfer-Encoding, never both";
            return Decision::Refuse(Refusal::malformed(message));
        }
        if findings.fragment {
            return Decision::Refuse(Refusal::malformed("a request target has no fragment ('#')"));
        }
        filter::decide(head, self.http_shutdown)
    }

    async fn forward(
        &self,
        uid: Option<u32>,
        head: Parts,
        body: Incoming,
        state: Rc<RequestState>,
    ) -> Response<ResponseBody> {
        let dump = |dumper: &Dumper| {
            dumper.request(head.method.as_str(), &head.uri.to_string(), &head.headers)
        };
        let (request_tap, dump) = self.dumper.as_ref().map(dump).unzip();
        let body = RequestBody::new(body, Rc::clone(&state), request_tap);
        let request = Outgoing::new(Rc::clone(&self.opening), &head.headers, body);
        // What came with it is of no more use, and an answer may take hours.
        drop(head);
        let mut record = Record::new(uid, state);
        match self.upstream.send(request).await {
            Ok((link, response)) => {
                let status = response.status().as_u16();
                record.status(status);
                let tap = dump.map(|dump| dump.response(status, response.headers()));
                let relay = Relay::new(link, Rc::clone(&self.upstream), record, tap);
                response.map(|()| ResponseBody::Relayed(Box::new(relay)))
            }
            Err(error) => failure(record, &error),
        }
    }
}

fn refuse(uid: Option<u32>, refusal: Refusal) -> Response<ResponseBody> {
    let status = refusal.status.as_u16();
    log::line(format_args!(
        "refused uid={} status={status} reason={:?}",
        Uid(uid),
        refusal.message
    ));
    refusal.response()
}

/// The answer where the upstream has none: the step that failed, in plain words; the rest is logged.
fn failure(mut record: Record, error: &UpstreamError) -> Response<ResponseBody> {
    let (status, code, message, detail) = match error {
        UpstreamError::Connect(error) => {
            let status = match error {
                ConnectError::Timeout => StatusCode::GATEWAY_TIMEOUT,
                _ => StatusCode::BAD_GATEWAY,
            };
            (
                status,
                "upstream_unreachable",
                error.to_string(),
                format!("{error}: {}", error.detail()),
            )
        }
        UpstreamError::Exchange(error) => {
            let (status, code, message) = match error {
                ExchangeError::Request(_) => (
                    StatusCode::BAD_REQUEST,
                    "malformed_request",
                    "the request's body broke off or is malformed",
                ),
                ExchangeError::Malformed(_) => (
                    StatusCode::BAD_GATEWAY,
                    "upstream_failed",
                    "the upstream's answer is not HTTP that can be passed on (protocol)",
                ),
                ExchangeError::Io(_) | ExchangeError::Unanswered => (
                    StatusCode::BAD_GATEWAY,
                    "upstream_failed",
                    "the upstream closed the connection before it answered (protocol)",
                ),
            };
            (status, code, message.to_owned(), with_sources(error))
        }
    };
    record.failed(status.as_u16(), detail);
    error_response(status, code, &message)
}
