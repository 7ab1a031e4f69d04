//! What is to be written next: a head, a piece of a body, and what frames it, in one vectored write.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use hyper::body::Bytes;
use tokio::io::AsyncWrite;

use crate::outgoing::Opening;

/// What is behind a chunk, behind a body's last chunk, and in place of both where there is no chunk
/// left (RFC 9112, section 7.1).
const CHUNK_END: &[u8] = b"\r\n";
const LAST_CHUNK_END: &[u8] = b"\r\n0\r\n\r\n";
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// How many slices there are at most: the opening of a request, the credential and the rest of the
/// head; then a chunk's size, data, and what is behind them.
const SLICES: usize = 6;

/// A body that goes out.
pub trait Source {
    /// Why there is no more of it.
    type Error;

    /// Gives the next piece, which may be empty, as soon as there is any.
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>>;

    /// Whether there is no more. A body may be over without this being known.
    fn is_over(&self) -> bool;
}

/// Bytes that go out together, one batch of a message after the other.
pub struct Batch {
    /// What a request's head begins with, the credential included; a response has none.
    opening: Option<Rc<Opening>>,
    /// A head, or the rest of it; empty once it is written.
    head: Vec<u8>,
    /// The size of a chunk.
    size: String,
    /// A piece of a body.
    data: Bytes,
    /// What is behind a chunk.
    end: &'static [u8],
    /// How much of all these is written.
    written: usize,
    is_chunked: bool,
    /// All of the body is in here or written.
    body_is_over: bool,
}

impl Batch {
    /// Begins with a head, behind an opening if it is a request's. There may be no body to come.
    #[must_use]
    pub fn new(
        opening: Option<Rc<Opening>>,
        head: Vec<u8>,
        is_chunked: bool,
        body_is_over: bool,
    ) -> Self {
        Self {
            opening,
            head,
            size: String::new(),
            data: Bytes::new(),
            end: b"",
            written: 0,
            is_chunked,
            body_is_over,
        }
    }

    /// Whether the whole body has been taken.
    #[must_use]
    pub fn body_is_over(&self) -> bool {
        self.body_is_over
    }

    /// Takes the next piece of the body, if the last has been written and there is one.
    ///
    /// # Errors
    ///
    /// Those of `body`.
    pub fn fill<S: Source>(&mut self, cx: &mut Context<'_>, body: &mut S) -> Result<(), S::Error> {
        while !self.body_is_over && self.takes_piece() {
            let piece = match body.poll_data(cx) {
                Poll::Pending => break,
                Poll::Ready(Some(piece)) => piece?,
                Poll::Ready(None) => {
                    self.body_is_over = true;
                    Bytes::new()
                }
            };
            self.body_is_over |= body.is_over();
            self.add(piece);
        }
        Ok(())
    }

    /// Whether a piece can be added: there is none that is not written.
    fn takes_piece(&self) -> bool {
        self.data.is_empty() && self.end.is_empty()
    }

    /// Adds a piece of the body. As a chunk, an empty piece is none: it would end the body.
    fn add(&mut self, piece: Bytes) {
        if self.is_chunked {
            self.end = match (piece.is_empty(), self.body_is_over) {
                (true, false) => b"",
                (true, true) => LAST_CHUNK,
                (false, false) => CHUNK_END,
                (false, true) => LAST_CHUNK_END,
            };
            if !piece.is_empty() {
                self.size = format!("{:x}\r\n", piece.len());
            }
        }
        self.data = piece;
    }

    /// Writes some of what there is; false if there is nothing.
    ///
    /// # Errors
    ///
    /// Those of `io`.
    pub fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<io::Result<bool>> {
        let (slices, count) = self.slices();
        if count == 0 {
            return Poll::Ready(Ok(false));
        }
        let written = ready!(Pin::new(io).poll_write_vectored(cx, &slices[..count]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.advance(written);
        Poll::Ready(Ok(true))
    }

    fn parts(&self) -> [&[u8]; SLICES] {
        let [line, credential] = match &self.opening {
            Some(opening) => opening.parts(),
            None => [&b""[..]; 2],
        };
        let size = self.size.as_bytes();
        [line, credential, &self.head, size, &self.data, self.end]
    }

    /// What is to be written: so many of these slices.
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

    /// So many bytes of [`Batch::slices`] have been written.
    fn advance(&mut self, count: usize) {
        self.written += count;
        let length: usize = self.parts().iter().map(|part| part.len()).sum();
        if self.written == length {
            // The memory is let go of, too: what comes next may take hours.
            *self = Self::new(None, Vec::new(), self.is_chunked, self.body_is_over);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credential::Credential;
    use hyper::header::HeaderValue;

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
        assert!(batch.opening.is_none() && batch.head.capacity() == 0);
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
        type Case<'a> = (&'a str, bool, bool, Option<&'static str>, &'a str);
        let cases: [Case<'_>; 7] = [
            ("no body", false, true, None, ""),
            ("a piece", false, false, Some("body"), "body"),
            ("an empty piece", false, false, Some(""), ""),
            (
                "a chunk",
                true,
                false,
                Some("0123456789"),
                "a\r\n0123456789\r\n",
            ),
            (
                "the last chunk",
                true,
                true,
                Some("body"),
                "4\r\nbody\r\n0\r\n\r\n",
            ),
            ("no chunk", true, false, Some(""), ""),
            ("no chunk any more", true, true, Some(""), "0\r\n\r\n"),
        ];
        for (name, is_chunked, is_last, piece, expected) in cases {
            for limits in [&[255][..], &[1], &[2, 0, 3], &[7], &[13, 1], &[40]] {
                let rest = b"\r\nhost: up\r\n\r\n".to_vec();
                let mut batch = Batch::new(Some(Rc::clone(&opening)), rest, is_chunked, is_last);
                assert!(batch.takes_piece(), "{name}");
                piece.into_iter().for_each(|piece| batch.add(piece.into()));
                assert_eq!(
                    written(batch, limits).escape_ascii().to_string(),
                    format!("{head}{expected}").escape_default().to_string(),
                    "{name}, {limits:?} bytes a write"
                );
            }
        }
    }
}
