//! A request on its way up: its head with the credential in it, and its body.
//!
//! The credential is never copied. What is written is a list of slices, one of which is the
//! credential's page; TLS copies from there into the record that it encrypts in place.

use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Context, Poll};

use hyper::body::Bytes;
use hyper::header::{HeaderMap, HeaderValue};

use crate::batch::{Batch, SLICES};
use crate::body::RequestBody;
use crate::credential::Credential;
use crate::headers;

/// How much memory a head is given at first, in bytes: most are smaller.
const USUAL_HEAD_BYTES: usize = 1 << 10;

/// What the heads of all requests have in common.
pub struct Opening {
    /// The request line and the name of the header that holds the credential.
    line: Vec<u8>,
    credential: Credential,
    host: HeaderValue,
}

impl Opening {
    /// Of `POST` requests with a target in origin form (RFC 9112, section 3.2.1).
    #[must_use]
    pub fn new(origin_form: &str, host: HeaderValue, credential: Credential) -> Self {
        Self {
            line: format!("POST {origin_form} HTTP/1.1\r\nauthorization: ").into_bytes(),
            credential,
            host,
        }
    }

    /// What each of them begins with; the last is the credential. Whoever calls this must hand the
    /// bytes to the wire and keep no copy.
    #[must_use]
    pub fn parts(&self) -> [&[u8]; 2] {
        [&self.line, self.credential.expose()]
    }
}

/// A request of which something is still to be written.
pub struct Outgoing {
    batch: Batch,
    body: RequestBody,
    is_chunked: bool,
    /// All of the body is in the batch or written.
    body_is_over: bool,
}

impl Outgoing {
    /// A request with the end-to-end ones of `client`'s headers. A known length stays a length, and
    /// chunks stay chunks.
    #[must_use]
    pub fn new(opening: Rc<Opening>, client: &HeaderMap, body: RequestBody) -> Self {
        let is_chunked = body.length().is_none();
        let mut head = Vec::with_capacity(USUAL_HEAD_BYTES);
        head.extend_from_slice(b"\r\n");
        headers::write_for_upstream(client, &opening.host, &mut head);
        if is_chunked {
            head.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        head.extend_from_slice(b"\r\n");
        Self {
            batch: Batch::new(Some(opening), head),
            is_chunked,
            body_is_over: body.length() == Some(0),
            body,
        }
    }

    /// Takes the next piece of the body, if the last has been written and the client has sent one.
    ///
    /// # Errors
    ///
    /// The client broke its body off, or sent something that is no body.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Result<(), hyper::Error> {
        while !self.body_is_over && self.batch.takes_piece() {
            let piece = match self.body.poll_data(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(piece)) => piece?,
                Poll::Ready(None) => {
                    self.body_is_over = true;
                    Bytes::new()
                }
            };
            self.body_is_over |= self.body.is_over();
            if self.is_chunked {
                self.batch.add_chunk(piece, self.body_is_over);
            } else {
                self.batch.add(piece);
            }
        }
        Ok(())
    }

    /// Lets the client go on to its next request, if this one has come whole.
    pub async fn discard(self) {
        self.body.discard().await;
    }

    /// What is to be written, in one vectored write: so many of these slices.
    #[must_use]
    pub fn slices(&self) -> ([IoSlice<'_>; SLICES], usize) {
        self.batch.slices()
    }

    /// So many bytes of [`Outgoing::slices`] have been written.
    pub fn advance(&mut self, count: usize) {
        self.batch.advance(count);
    }

    /// Whether the whole body has been taken.
    #[must_use]
    pub fn body_is_over(&self) -> bool {
        self.body_is_over
    }
}
