//! One exchange: a client's request, decided on, forwarded, and its answer on the way back.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use hyper::body::Incoming;
use hyper::header::{CONNECTION, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode, Version};
use tokio::net::TcpStream;

use crate::body::{Progress, Relay, RequestBody, RequestState, ResponseBody};
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

/// What is known of one client connection.
#[derive(Default)]
pub struct Client {
    /// The uid of the process at the other end, where it was asked for.
    pub uid: Option<u32>,
    /// Whether that user may not be served.
    pub is_refused: bool,
    /// What the second look at its heads found.
    pub findings: Cell<Findings>,
    /// Whether it is in the middle of sending a head.
    pub in_head: Cell<bool>,
    /// Whether it may be in the middle of sending a body; where a chunked one ends is not known here.
    pub in_body: Cell<bool>,
    /// Its last request.
    pub request: RefCell<Option<Rc<RequestState>>>,
    /// Whether an HTTP/1.0 answer is under way, whose end is the connection's: if it breaks off, the
    /// connection must be reset, or the client would take the part for the whole.
    pub ends_by_close: Cell<bool>,
}

impl Client {
    /// Whether it has sent nothing yet.
    pub fn is_new(&self) -> bool {
        self.request.borrow().is_none()
    }

    /// Whether a request of its is being forwarded: then others hold its state, too.
    pub fn is_busy(&self) -> bool {
        self.request
            .borrow()
            .as_ref()
            .is_some_and(|request| Rc::strong_count(request) > 1)
    }

    /// Whether it has not sent all of its last request's body.
    pub fn may_be_sending(&self) -> bool {
        let is_complete = |request: &Rc<RequestState>| request.progress() == Progress::Complete;
        self.in_body.get() && !self.request.borrow().as_ref().is_some_and(is_complete)
    }
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
            ..Client::default()
        }
    }

    /// Answers one request.
    pub async fn answer(
        &self,
        client: &Client,
        request: Request<Incoming>,
    ) -> Response<ResponseBody> {
        client
            .ends_by_close
            .set(request.version() == Version::HTTP_10);
        let (head, body) = request.into_parts();
        let state = RequestState::of(&body);
        client.request.replace(Some(Rc::clone(&state)));
        let findings = client.findings.get();
        let mut response = match self.decide(&head, client) {
            Decision::Forward => self.forward(client.uid, head, body, state).await,
            Decision::Refuse(refusal) => refuse(client.uid, refusal),
            Decision::Shutdown => {
                log::line(format_args!(
                    "stopping: GET /shutdown by uid={}",
                    Uid(client.uid)
                ));
                self.stop.begin();
                Response::new(ResponseBody::from(hyper::body::Bytes::new()))
            }
        };
        if findings.chunked || findings.fragment || findings.two_framings {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn decide(&self, head: &Parts, client: &Client) -> Decision {
        if client.is_refused {
            let message = "this user may not use this proxy, or its connection was closed too early to tell whose it is";
            return Decision::Refuse(Refusal::forbidden("user_not_allowed", message));
        }
        let findings = client.findings.get();
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
