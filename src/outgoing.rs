//! A request on its way up: its head with the credential in it, and its body.
//!
//! The credential is never copied. What is written is a list of slices, one of which is the
//! credential's page; TLS copies from there into the record that it encrypts in place.

use std::io;
use std::rc::Rc;
use std::task::{Context, Poll};

use hyper::header::{HeaderMap, HeaderValue};
use tokio::io::AsyncWrite;

use crate::batch::Batch;
use crate::body::RequestBody;
use crate::credential::Credential;
use crate::headers;

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
}

impl Outgoing {
    /// A request with the end-to-end ones of `client`'s headers. A known length stays a length, and
    /// chunks stay chunks.
    #[must_use]
    pub fn new(opening: Rc<Opening>, client: &HeaderMap, body: RequestBody) -> Self {
        let is_chunked = body.length().is_none();
        let mut head = Vec::with_capacity(headers::USUAL_HEAD_BYTES);
        head.extend_from_slice(b"\r\n");
        headers::write_for_upstream(client, &opening.host, &mut head);
        if is_chunked {
            head.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        head.extend_from_slice(b"\r\n");
        Self {
            batch: Batch::new(Some(opening), head, is_chunked, body.length() == Some(0)),
            body,
        }
    }

    /// Writes some of what there is, and false if that is nothing: the client has sent no more.
    ///
    /// # Errors
    ///
    /// The client broke its body off or sent something that is no body, or `io` failed.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncWrite + Unpin),
    ) -> Result<Poll<io::Result<bool>>, hyper::Error> {
        self.batch.fill(cx, &mut self.body)?;
        Ok(self.batch.poll_write(cx, io))
    }

    /// Lets the client go on to its next request, if this one has come whole.
    pub async fn discard(self) {
        self.body.discard().await;
    }

    /// Whether the whole body has been taken.
    #[must_use]
    pub fn body_is_over(&self) -> bool {
        self.batch.body_is_over()
    }
}
