//! A request on its way up: its head with the credential in it, and its body.
//!
//! The credential is never copied. What is written is a list of slices, one of which is the
//! credential's page; TLS copies from there into the record that it encrypts in place.

use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Context, Poll};

use hyper::body::Bytes;
use hyper::header::{HeaderMap, HeaderValue};

use crate::body::RequestBody;
use crate::credential::Credential;
use crate::headers;

/// How much memory a head is given at first, in bytes: most are smaller.
const USUAL_HEAD_BYTES: usize = 1 << 10;

/// What is at the end of a chunk, of a body's last chunk, and where a body has no chunk left
/// (RFC 9112, section 7.1).
const CHUNK_END: &[u8] = b"\r\n";
const LAST_CHUNK_END: &[u8] = b"\r\n0\r\n\r\n";
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// How many slices are written at once: the opening, the credential and the rest of the head; then a
/// chunk's size, data, and what is behind them.
const SLICES: usize = 6;

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
}

/// What is to be written next.
struct Batch {
    opening: Rc<Opening>,
    /// The head from behind the credential on; empty once it is written.
    head: Vec<u8>,
    /// The size of a chunk.
    size: String,
    /// A piece of the body.
    data: Bytes,
    /// What is behind a chunk.
    end: &'static [u8],
    /// How much of all these is written.
    written: usize,
}

impl Batch {
    fn parts(&self) -> [&[u8]; SLICES] {
        let (line, credential) = if self.head.is_empty() {
            (&b""[..], &b""[..])
        } else {
            (&self.opening.line[..], self.opening.credential.expose())
        };
        let size = self.size.as_bytes();
        [line, credential, &self.head, size, &self.data, self.end]
    }

    fn slices(&self) -> ([IoSlice<'_>; SLICES], usize) {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let (mut count, mut written) = (0, self.written);
        for part in self.parts() {
            let rest = &part[written.min(part.len())..];
            written -= part.len() - rest.len();
            if !rest.is_empty() {
                slices[count] = IoSlice::new(rest);
                count += 1;
            }
        }
        (slices, count)
    }

    fn advance(&mut self, count: usize) {
        self.written += count;
        let length: usize = self.parts().iter().map(|part| part.len()).sum();
        if self.written == length {
            // The memory is let go of, too: an answer may take hours.
            self.head = Vec::new();
            self.size.clear();
            self.data = Bytes::new();
            self.end = b"";
            self.written = 0;
        }
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
            batch: Batch {
                opening,
                head,
                size: String::new(),
                data: Bytes::new(),
                end: b"",
                written: 0,
            },
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
        while !self.body_is_over && self.batch.data.is_empty() && self.batch.end.is_empty() {
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
                self.batch.end = match (piece.is_empty(), self.body_is_over) {
                    (true, false) => b"",
                    (true, true) => LAST_CHUNK,
                    (false, false) => CHUNK_END,
                    (false, true) => LAST_CHUNK_END,
                };
                if !piece.is_empty() {
                    self.batch.size = format!("{:x}\r\n", piece.len());
                }
            }
            self.batch.data = piece;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written, `limits` bytes a write.
    fn written(mut batch: Batch, limits: &[usize]) -> Vec<u8> {
        let mut wire = Vec::new();
        for limit in limits.iter().cycle() {
            let (slices, count) = batch.slices();
            let all: Vec<u8> = slices[..count]
                .iter()
                .flat_map(|slice| slice.to_vec())
                .collect();
            if all.is_empty() {
                break;
            }
            let count = all.len().min(*limit);
            wire.extend_from_slice(&all[..count]);
            batch.advance(count);
        }
        assert!(batch.head.capacity() == 0 && batch.data.is_empty());
        wire
    }

    #[test]
    fn the_credential_is_in_its_place_with_every_short_write() {
        let mut key = Some(b"sk-mine");
        let credential = Credential::read(|buffer| {
            let key = key.take().map_or(&b""[..], |key| key);
            buffer[..key.len()].copy_from_slice(key);
            Ok(key.len())
        });
        let host = HeaderValue::from_static("up");
        let opening = Rc::new(Opening::new("/r?a=b", host, credential.unwrap()));
        let head = "POST /r?a=b HTTP/1.1\r\nauthorization: Bearer sk-mine\r\nhost: up\r\n\r\n";
        type Case = (&'static str, &'static str, &'static str, &'static [u8]);
        let cases: [Case; 5] = [
            ("no body", "", "", b""),
            ("a length", "", "body", b""),
            ("a chunk", "4\r\n", "body", CHUNK_END),
            ("the last chunk", "4\r\n", "body", LAST_CHUNK_END),
            ("no chunk", "", "", LAST_CHUNK),
        ];
        for (name, size, data, end) in cases {
            for limits in [&[255][..], &[1], &[2, 0, 3], &[7], &[13, 1], &[40]] {
                let batch = Batch {
                    opening: Rc::clone(&opening),
                    head: b"\r\nhost: up\r\n\r\n".to_vec(),
                    size: size.to_owned(),
                    data: Bytes::from_static(data.as_bytes()),
                    end,
                    written: 0,
                };
                let expected = [head.as_bytes(), size.as_bytes(), data.as_bytes(), end].concat();
                assert_eq!(
                    written(batch, limits).escape_ascii().to_string(),
                    expected.escape_ascii().to_string(),
                    "{name}, {limits:?} bytes a write"
                );
            }
        }
    }
}
