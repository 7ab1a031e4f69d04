//! What is to be written next: a head, a piece of a body, and what frames it, in one vectored write.

use std::io::IoSlice;
use std::rc::Rc;

use hyper::body::Bytes;

use crate::outgoing::Opening;

/// What is behind a chunk, behind a body's last chunk, and in place of both where there is no chunk
/// left (RFC 9112, section 7.1).
const CHUNK_END: &[u8] = b"\r\n";
const LAST_CHUNK_END: &[u8] = b"\r\n0\r\n\r\n";
const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// How many slices there are at most: the opening of a request, the credential and the rest of the
/// head; then a chunk's size, data, and what is behind them.
pub const SLICES: usize = 6;

/// Bytes that go out together.
#[derive(Default)]
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
}

impl Batch {
    /// Begins with a head, behind an opening if it is a request's.
    #[must_use]
    pub fn new(opening: Option<Rc<Opening>>, head: Vec<u8>) -> Self {
        Self {
            opening,
            head,
            ..Self::default()
        }
    }

    /// Whether a piece can be added: there is none that is not written.
    #[must_use]
    pub fn takes_piece(&self) -> bool {
        self.data.is_empty() && self.end.is_empty()
    }

    /// Adds a piece of a body.
    pub fn add(&mut self, piece: Bytes) {
        self.data = piece;
    }

    /// Adds a piece of a body as a chunk; after the last one there is none. An empty piece is no chunk,
    /// which would end the body.
    pub fn add_chunk(&mut self, piece: Bytes, is_last: bool) {
        self.end = match (piece.is_empty(), is_last) {
            (true, false) => b"",
            (true, true) => LAST_CHUNK,
            (false, false) => CHUNK_END,
            (false, true) => LAST_CHUNK_END,
        };
        if !piece.is_empty() {
            self.size = format!("{:x}\r\n", piece.len());
        }
        self.data = piece;
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
    #[must_use]
    pub fn slices(&self) -> ([IoSlice<'_>; SLICES], usize) {
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
    pub fn advance(&mut self, count: usize) {
        self.written += count;
        let length: usize = self.parts().iter().map(|part| part.len()).sum();
        if self.written == length {
            // The memory is let go of, too: what comes next may take hours.
            *self = Self::default();
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
        type Add = fn(&mut Batch);
        let cases: [(&str, Add, &str); 7] = [
            ("no body", |_| {}, ""),
            ("a piece", |batch| batch.add("body".into()), "body"),
            ("an empty piece", |batch| batch.add("".into()), ""),
            (
                "a chunk",
                |batch| batch.add_chunk("0123456789".into(), false),
                "a\r\n0123456789\r\n",
            ),
            (
                "the last chunk",
                |batch| batch.add_chunk("body".into(), true),
                "4\r\nbody\r\n0\r\n\r\n",
            ),
            ("no chunk", |batch| batch.add_chunk("".into(), false), ""),
            (
                "no chunk any more",
                |batch| batch.add_chunk("".into(), true),
                "0\r\n\r\n",
            ),
        ];
        for (name, add, expected) in cases {
            for limits in [&[255][..], &[1], &[2, 0, 3], &[7], &[13, 1], &[40]] {
                let rest = b"\r\nhost: up\r\n\r\n".to_vec();
                let mut batch = Batch::new(Some(Rc::clone(&opening)), rest);
                assert!(batch.takes_piece(), "{name}");
                add(&mut batch);
                assert_eq!(
                    written(batch, limits).escape_ascii().to_string(),
                    format!("{head}{expected}").escape_default().to_string(),
                    "{name}, {limits:?} bytes a write"
                );
            }
        }
    }
}
