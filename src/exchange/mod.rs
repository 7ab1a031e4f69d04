//! One exchange: a request comes in with whose it is, and is decided on; what may pass goes up, and its
//! answer leaves. Whatever happens, it is logged.

mod body;
mod client;
pub mod dump;
mod filter;
mod headers;
mod record;
mod refusal;

use std::rc::Rc;

use http_body_util::Either;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, EXPECT, HeaderValue, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::{Request, Response, Version};
use serde_json::json;

use self::body::Upload;
pub use self::body::{AnswerBody, Download};
pub use self::client::Client;
use self::dump::Dumper;
use self::filter::Decision;
use self::record::Record;
use self::refusal::{Refusal, error_response};
use crate::log::{self, Uid};
use crate::stop::Stop;
use crate::upstream::{self, Failure, Upstream};

/// What all exchanges have in common.
pub struct Proxy {
    /// Where requests go.
    pub upstream: Rc<Upstream>,
    /// Whether `GET /shutdown` ends the process.
    pub http_shutdown: bool,
    /// Writes exchanges to files, where that is asked for.
    pub dumper: Option<Dumper>,
    /// Begins the end.
    pub stop: Stop,
}

impl Proxy {
    /// Answers one request.
    pub async fn answer(
        &self,
        client: Rc<Client>,
        request: Request<Incoming>,
    ) -> Response<AnswerBody> {
        let (head, body) = request.into_parts();
        client.asks(head.version, &body);
        let mut upload = Upload::new(body, Rc::clone(&client));
        // hyper follows the chunks where there is a length, too: such a connection must not go on
        // (RFC 9112, section 6.1).
        let is_last = client.is_refused
            || head.version == Version::HTTP_10
            || head.headers.contains_key(TRANSFER_ENCODING);
        let mut response = match filter::decide(&head, &client, self.http_shutdown) {
            Decision::Forward => self.forward(&client, head, upload).await,
            decision => {
                // Who waits for a 100 (Continue) has sent nothing, and need not.
                if !is_last && !head.headers.contains_key(EXPECT) {
                    upstream::discard(&mut upload).await;
                }
                match decision {
                    Decision::Refuse(refusal) => refuse(client.uid, refusal),
                    _ => self.shut_down(client.uid),
                }
            }
        };
        if is_last || !client.has_sent_all.get() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        response
    }

    async fn forward(
        &self,
        client: &Rc<Client>,
        head: Parts,
        mut upload: Upload,
    ) -> Response<AnswerBody> {
        let dump = self
            .dumper
            .as_ref()
            .map(|dumper| (dumper, dumper.next_exchange()));
        upload.tap = dump.as_ref().map(|(dumper, exchange)| {
            let about = json!({ "method": head.method.as_str(), "url": head.uri.to_string() });
            dumper.begin(exchange, "request", about, &head.headers)
        });
        let mut record = Record::new(Rc::clone(client));
        let headers = headers::for_upstream(head.headers, &self.upstream.host);
        match self.upstream.send(headers, Box::pin(upload)).await {
            Ok((link, answer)) => {
                let (head, body) = answer.into_parts();
                let status = head.status.as_u16();
                record.status(status);
                let tap = dump.map(|(dumper, exchange)| {
                    dumper.begin(
                        &exchange,
                        "response",
                        json!({ "status": status }),
                        &head.headers,
                    )
                });
                let upstream = Rc::clone(&self.upstream);
                let download = Download::new(body, link, upstream, record, tap);
                let mut response = Response::new(Either::Right(download));
                *response.status_mut() = head.status;
                *response.headers_mut() = headers::end_to_end(head.headers);
                // The reason phrase, where it isn't the usual one.
                *response.extensions_mut() = head.extensions;
                response
            }
            Err(failure) => fail(record, failure),
        }
    }

    fn shut_down(&self, uid: Option<u32>) -> Response<AnswerBody> {
        log::line(format_args!("stopping: GET /shutdown by uid={}", Uid(uid)));
        self.stop.begin();
        Response::new(Either::Left(Bytes::new().into()))
    }
}

fn refuse(uid: Option<u32>, refusal: Refusal) -> Response<AnswerBody> {
    let (uid, status) = (Uid(uid), refusal.status.as_u16());
    let reason = refusal.message;
    log::line(format_args!(
        "refused uid={uid} status={status} reason={reason:?}"
    ));
    error_response(refusal.status, refusal.code, reason)
}

/// The answer where the upstream has none: the step that failed, in plain words; the rest is logged.
fn fail(mut record: Record, failure: Failure) -> Response<AnswerBody> {
    let Failure {
        status,
        code,
        message,
        detail,
    } = failure;
    record.status(status.as_u16());
    record.ended(Some(format!("{message}: {detail}")));
    error_response(status, code, message)
}
