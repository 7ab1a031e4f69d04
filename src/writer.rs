//! Writes one response to a client (RFC 9112).

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Bytes, Incoming};
use hyper::ext::ReasonPhrase;
use hyper::header::{CONNECTION, CONTENT_LENGTH};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

use crate::batch::Batch;
use crate::body::ResponseBody;
use crate::headers;
use crate::link::ExchangeError;

/// How much memory a head is given at first, in bytes: most are smaller.
const USUAL_HEAD_BYTES: usize = 1 << 10;

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
        let mut options = request
            .headers()
            .get_all(CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
        Self {
            is_http_1_0,
            is_head: request.method() == Method::HEAD,
            closes: is_http_1_0
                || options.any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close")),
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
    Client(io::Error),
    /// The upstream broke its answer off.
    Upstream(ExchangeError),
}

/// A response of which something is still to be written.
pub struct Writer {
    batch: Batch,
    body: ResponseBody,
    framing: Framing,
    /// All of the body is in the batch or written.
    body_is_over: bool,
}

impl Writer {
    /// Of a response to a request in this manner.
    #[must_use]
    pub fn new(response: Response<ResponseBody>, manner: Manner) -> Self {
        let (head, body) = response.into_parts();
        let has_no_body = matches!(
            head.status,
            StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED
        );
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
        let mut text = Vec::with_capacity(USUAL_HEAD_BYTES);
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
            batch: Batch::new(None, text),
            body_is_over: framing == Framing::Empty || body.is_over(),
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
            self.fill(cx)?;
            let (slices, count) = self.batch.slices();
            if count == 0 {
                return match self.body_is_over {
                    true => Poll::Ready(Ok(())),
                    false => Poll::Pending,
                };
            }
            match Pin::new(&mut *tcp).poll_write_vectored(cx, &slices[..count]) {
                Poll::Ready(Ok(0)) => {
                    let error = io::ErrorKind::WriteZero.into();
                    return Poll::Ready(Err(WriteError::Client(error)));
                }
                Poll::Ready(Ok(written)) => self.batch.advance(written),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(WriteError::Client(error))),
                Poll::Pending => {
                    // A client that reads nothing may be busy sending.
                    self.body.send_on(cx).map_err(WriteError::Upstream)?;
                    return Poll::Pending;
                }
            }
        }
    }

    /// Takes the next piece of the body, if the last has been written and there is one.
    fn fill(&mut self, cx: &mut Context<'_>) -> Result<(), WriteError> {
        while !self.body_is_over && self.batch.takes_piece() {
            let piece = match self.body.poll_data(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(piece)) => piece.map_err(WriteError::Upstream)?,
                Poll::Ready(None) => {
                    self.body_is_over = true;
                    Bytes::new()
                }
            };
            self.body_is_over |= self.body.is_over();
            match self.framing {
                Framing::Chunked => self.batch.add_chunk(piece, self.body_is_over),
                _ => self.batch.add(piece),
            }
        }
        Ok(())
    }
}
