//! Writes one response to a client (RFC 9112).

use std::task::{Context, Poll};

use hyper::body::Incoming;
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, CONTENT_LENGTH};
use hyper::{Method, Request, Response, Version};
use tokio::net::TcpStream;

use crate::answer::has_no_body;
use crate::batch::{Batch, Source};
use crate::body::ResponseBody;
use crate::headers;

/// What a request says about its response and what comes after.
#[derive(Clone, Copy)]
pub struct Manner {
    /// The client knows neither chunks nor connections that stay.
    pub is_http_1_0: bool,
    /// It wants the head alone.
    pub is_head: bool,
    /// It will send no other request.
    pub closes: bool,
}

impl Manner {
    /// Of this request.
    #[must_use]
    pub fn of(request: &Request<Incoming>) -> Self {
        let is_http_1_0 = request.version() == Version::HTTP_10;
        let mut connection = request.headers().get_all(CONNECTION).iter();
        Self {
            is_http_1_0,
            is_head: request.method() == Method::HEAD,
            closes: is_http_1_0 || connection.any(|value| headers::closes(value.as_bytes())),
        }
    }
}

/// How the end of a body is told.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// There is none.
    Empty,
    /// By a length, which the head tells.
    Length,
    /// By a last chunk.
    Chunked,
    /// By the end of the connection.
    Close,
}

/// Why a response is not complete.
#[derive(Debug)]
pub enum WriteError {
    /// The client takes no more.
    Client,
    /// The upstream broke its answer off; the log says how.
    Upstream,
}

/// A response of which something is still to be written.
pub struct Writer {
    batch: Batch,
    body: ResponseBody,
    framing: Framing,
}

impl Writer {
    /// Of a response to a request in this manner.
    #[must_use]
    pub fn new(response: Response<ResponseBody>, manner: Manner) -> Self {
        let (head, body) = response.into_parts();
        let has_no_body = has_no_body(head.status);
        let framing = match body.length() {
            _ if has_no_body || manner.is_head => Framing::Empty,
            Some(_) => Framing::Length,
            None if manner.is_http_1_0 => Framing::Close,
            None => Framing::Chunked,
        };
        let version = if manner.is_http_1_0 {
            "HTTP/1.0"
        } else {
            "HTTP/1.1"
        };
        let reason = match head.extensions.get::<ReasonPhrase>() {
            Some(reason) => reason.as_bytes(),
            None => head
                .status
                .canonical_reason()
                .unwrap_or_default()
                .as_bytes(),
        };
        let mut text = Vec::with_capacity(headers::USUAL_HEAD_BYTES);
        for part in [version, " ", head.status.as_str(), " "] {
            text.extend_from_slice(part.as_bytes());
        }
        text.extend_from_slice(reason);
        text.extend_from_slice(b"\r\n");
        for (name, value) in &head.headers {
            headers::write(name.as_str(), value.as_bytes(), &mut text);
        }
        // The upstream's own is among the headers; our words have none yet.
        if let Some(length) = body.length()
            && !has_no_body
            && !head.headers.contains_key(CONTENT_LENGTH)
        {
            headers::write("content-length", length.to_string().as_bytes(), &mut text);
        }
        if framing == Framing::Chunked {
            headers::write("transfer-encoding", b"chunked", &mut text);
        }
        if manner.closes {
            headers::write("connection", b"close", &mut text);
        }
        text.extend_from_slice(b"\r\n");
        Self {
            batch: Batch::new(
                None,
                text,
                framing == Framing::Chunked,
                framing == Framing::Empty || body.is_over(),
            ),
            body,
            framing,
        }
    }

    /// Whether only the end of the connection tells where the body ends.
    #[must_use]
    pub fn ends_by_close(&self) -> bool {
        self.framing == Framing::Close
    }

    /// Writes what there is, and what comes, until it is all written.
    ///
    /// # Errors
    ///
    /// See [`WriteError`]. What has been written is not a whole response.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        tcp: &mut TcpStream,
    ) -> Poll<Result<(), WriteError>> {
        loop {
            self.batch
                .fill(cx, &mut self.body)
                .map_err(|_| WriteError::Upstream)?;
            match self.batch.poll_write(cx, tcp) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) if self.batch.body_is_over() => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(false)) => return Poll::Pending,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(WriteError::Client)),
                Poll::Pending => {
                    // A client that reads nothing may be busy sending.
                    self.body.send_on(cx).map_err(|_| WriteError::Upstream)?;
                    return Poll::Pending;
                }
            }
        }
    }
}
