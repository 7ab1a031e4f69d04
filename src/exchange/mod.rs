//! One exchange: a request comes in with whose it is, and is decided on; what may pass goes up, and its
//! answer leaves. Whatever happens, it is logged.

mod body;
mod client;
pub mod dump;
mod filter;
mod headers;
mod record;
mod refusal;
mod tunnel;

use std::rc::Rc;

use http_body_util::Either;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HeaderValue, TRANSFER_ENCODING};
use hyper::http::request::Parts;
use hyper::{Request, Response, StatusCode, Version};
use serde_json::json;

use self::body::Upload;
pub use self::body::{AnswerBody, Download};
pub use self::client::Client;
use self::dump::Dumper;
pub use self::filter::Allowed;
use self::filter::Wanted;
use self::record::Record;
use self::tunnel::Tunnel;
use crate::failure::Failure;
use crate::log;
use crate::stop::Stop;
use crate::upstream::{self, Kind, Link, Upstream};

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
        client: Rc<Client>,
        request: Request<Incoming>,
    ) -> Response<AnswerBody> {
        let (head, body) = request.into_parts();
        let version = head.version;
        client.asks(version, &body);
        let mut upload = Upload {
            body,
            client: Rc::clone(&client),
            received: Rc::default(),
            tap: None,
        };
        // hyper follows the chunks where there is a length, too: such a connection must not go on
        // (RFC 9112, section 6.1).
        let is_last = client.is_refused
            || version == Version::HTTP_10
            || head.headers.contains_key(TRANSFER_ENCODING);
        let mut response = match filter::decide(&head, &client, self.allowed) {
            Ok(Wanted::Forward(kind)) => self.forward(&client, kind, head, upload).await,
            decision => {
                // Who waits for a 100 (Continue) has sent nothing, and need not.
                if !is_last && !head.headers.contains_key(EXPECT) {
                    upstream::discard(&mut upload).await;
                }
                self.end_here(decision.err(), &log::uid(client.uid))
            }
        };
        *response.version_mut() = version;
        if is_last || !client.has_sent_all.get() {
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(CONNECTION, close);
        }
        response
    }

    /// Refuses a request, or ends the program.
    fn end_here(&self, refusal: Option<Failure>, uid: &str) -> Response<AnswerBody> {
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
        client: &Rc<Client>,
        kind: Kind,
        head: Parts,
        mut upload: Upload,
    ) -> Response<AnswerBody> {
        let dumper = self.dumper.as_ref();
        let dump = dumper.map(|dumper| (dumper, dumper.next_name()));
        upload.tap = dump.as_ref().map(|(dumper, name)| {
            let about = json!({ "method": head.method.as_str(), "url": head.uri.to_string() });
            dumper.begin(&format!("{name}-request.json"), about, &head.headers)
        });
        let mut record = Record::new(client.uid, Rc::clone(&upload.received));
        let host = self.upstream.target.host_header.clone();
        let headers = headers::for_upstream(head.headers, host, kind);
        match self.upstream.send(kind, headers, Box::pin(upload)).await {
            Ok((link, answer)) if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
                switch(client, link, answer, record)
            }
            Ok((link, answer)) => {
                let (mut head, body) = answer.into_parts();
                record.status = head.status.as_u16();
                record.tap = dump.map(|(dumper, name)| {
                    let about = json!({ "status": record.status });
                    dumper.begin(&format!("{name}-response.json"), about, &head.headers)
                });
                client.link.replace(Some(link));
                let download =
                    Download::new(body, Rc::clone(&self.upstream), Rc::clone(client), record);
                head.headers = headers::end_to_end(head.headers, &[]);
                Response::from_parts(head, Either::Right(download))
            }
            Err(failure) => fail(&failure, record),
        }
    }
}

/// The response to a handshake that the upstream accepted. Once it has been flushed, the connection is a tunnel.
fn switch(
    client: &Client,
    link: Link,
    answer: Response<Incoming>,
    mut record: Record,
) -> Response<AnswerBody> {
    let Some((upstream, early)) = link.into_upgraded() else {
        let message = "the upstream switched protocols before it had the whole request (protocol)";
        return fail(&Failure::no_answer(message), record);
    };
    record.status = answer.status().as_u16();
    client.tunnel.replace(Some(Tunnel {
        upstream,
        early,
        record,
    }));
    let mut response = answer.map(|_| Either::Left(Bytes::new().into()));
    let headers = std::mem::take(response.headers_mut());
    *response.headers_mut() = headers::end_to_end(headers, &[CONTENT_LENGTH]);
    headers::switch_protocol(response.headers_mut());
    response
}

/// The step that failed, in plain words; the rest is logged.
fn fail(failure: &Failure, mut record: Record) -> Response<AnswerBody> {
    record.status = failure.status.as_u16();
    record.error = Some(format!("{}: {}", failure.message, failure.detail));
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
        let credential = crate::key::Credential::read(read).unwrap();
        Rc::new(Self {
            upstream: Rc::new(Upstream::new(target, connector, credential)),
            allowed: Allowed::default(),
            dumper: None,
            stop: Stop::default(),
        })
    }
}
