//! What comes back from the upstream: heads, and where bodies end (RFC 9112).
//!
//! Nothing here reads or writes. Bytes go in, however they are split; what they mean comes out.

use std::fmt;
use std::mem::MaybeUninit;

use httparse::{Header, ParserConfig, Status};
use hyper::body::Bytes;
use hyper::ext::ReasonPhrase;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use crate::headers::{closes, is_hop_by_hop, named_by_connection};
use crate::{MAX_HEAD_BYTES, MAX_HEADERS};

/// The longest line that carries no data, a chunk's size with its extensions or a trailer field, in
/// bytes; and the longest trailer section.
const MAX_OVERHEAD: usize = 16 << 10;

/// Why an answer is none: a phrase for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// The head of an answer, without what was about the connection alone.
#[derive(Debug)]
pub struct Head {
    /// Status, reason phrase and end-to-end headers, as they came.
    pub response: Response<()>,
    /// Where the body behind it ends.
    pub body: Decoder,
    /// Whether the upstream means to serve another request on this connection.
    pub is_persistent: bool,
    /// How many bytes it was.
    pub length: usize,
}

impl Head {
    /// Whether another head follows, with the actual answer (RFC 9110, section 15.2).
    #[must_use]
    pub fn is_interim(&self) -> bool {
        self.response.status().is_informational()
    }
}

/// Reads the head at the front of `bytes`; `None` if there is more of it to come.
///
/// # Errors
///
/// What came is no HTTP/1 answer, can be read in two ways, is too large, or switches to another
/// protocol, which nobody asked for.
pub fn parse(bytes: &[u8]) -> Result<Option<Head>, Malformed> {
    let mut fields = [MaybeUninit::uninit(); MAX_HEADERS];
    let mut head = httparse::Response::new(&mut []);
    let parsed =
        ParserConfig::default().parse_response_with_uninit_headers(&mut head, bytes, &mut fields);
    let length = match parsed {
        Ok(Status::Complete(length)) if length <= MAX_HEAD_BYTES => length,
        Ok(Status::Partial) if bytes.len() <= MAX_HEAD_BYTES => return Ok(None),
        Ok(_) => return Err(Malformed("the answer's head is too large")),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Malformed("the answer has too many headers"));
        }
        Err(_) => return Err(Malformed("the answer's head is not HTTP/1")),
    };
    let malformed = Malformed("the answer's head is not HTTP/1");
    let status = StatusCode::from_u16(head.code.unwrap_or(0)).map_err(|_| malformed)?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Malformed(
            "the upstream switched to another protocol unasked",
        ));
    }
    let is_http_1_0 = head.version == Some(0);
    let facts = Facts::of(head.headers);
    let mut response = Response::new(());
    *response.status_mut() = status;
    let reason = head.reason.unwrap_or_default();
    if status.canonical_reason() != Some(reason) {
        let reason = ReasonPhrase::try_from(reason.as_bytes()).map_err(|_| malformed)?;
        response.extensions_mut().insert(reason);
    }
    *response.headers_mut() =
        end_to_end(head.headers, &bytes[..length], &facts).map_err(|_| malformed)?;
    Ok(Some(Head {
        response,
        body: facts.body(status, is_http_1_0)?,
        is_persistent: !is_http_1_0 && !facts.closes,
        length,
    }))
}

/// What a head says about its connection and the end of its body.
#[derive(Default)]
struct Facts<'a> {
    lengths: usize,
    length: &'a [u8],
    codings: usize,
    is_chunked: bool,
    closes: bool,
    disowned: Vec<HeaderName>,
}

impl<'a> Facts<'a> {
    fn of(fields: &[Header<'a>]) -> Self {
        let mut facts = Self::default();
        for field in fields {
            let name = field.name;
            if name.eq_ignore_ascii_case("content-length") {
                facts.lengths += 1;
                facts.length = field.value;
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                facts.codings += 1;
                facts.is_chunked = field.value.eq_ignore_ascii_case(b"chunked");
            } else if name.eq_ignore_ascii_case("connection") {
                facts.closes |= closes(field.value);
                facts.disowned.extend(named_by_connection(field.value));
            }
        }
        facts
    }

    /// Where the body ends (RFC 9112, section 6.3). What can be read in two ways is refused, and so
    /// is a coding other than chunked: its header ends here, and the body would be another one.
    fn body(&self, status: StatusCode, is_http_1_0: bool) -> Result<Decoder, Malformed> {
        let state = match (self.codings, self.lengths) {
            _ if has_no_body(status) => State::Sized(0),
            (0, 0) => State::UntilEnd,
            (0, 1) => State::Sized(
                decimal(self.length)
                    .ok_or(Malformed("the answer's Content-Length is no number"))?,
            ),
            (1, 0) if self.is_chunked && !is_http_1_0 => State::Size { size: 0, digits: 0 },
            _ => {
                return Err(Malformed(
                    "the end of the answer's body can't be told for sure",
                ));
            }
        };
        Ok(Decoder { state, overhead: 0 })
    }
}

/// Whether messages of this status never have a body, whatever their headers say.
#[must_use]
pub fn has_no_body(status: StatusCode) -> bool {
    status.is_informational() || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// A number in decimal digits and nothing else; `str::parse` would take a sign.
fn decimal(text: &[u8]) -> Option<u64> {
    let is_number = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    is_number.then(|| std::str::from_utf8(text).ok()?.parse().ok())?
}

/// The headers that go on to the client. Their values share one copy of `bytes`, the head.
fn end_to_end(
    fields: &[Header<'_>],
    bytes: &[u8],
    facts: &Facts<'_>,
) -> Result<HeaderMap, hyper::http::Error> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    let copy = Bytes::copy_from_slice(bytes);
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes())?;
        if is_hop_by_hop(name.as_str()) || facts.disowned.contains(&name) {
            continue;
        }
        let value = match field.value {
            // The parser's own, and not in `bytes`.
            [] => HeaderValue::from_static(""),
            value => {
                let begin = value.as_ptr().addr() - bytes.as_ptr().addr();
                HeaderValue::from_maybe_shared(copy.slice(begin..begin + value.len()))?
            }
        };
        headers.append(name, value);
    }
    Ok(headers)
}

/// Where in a body its decoder is.
#[derive(Clone, Copy, Debug)]
enum State {
    /// So many bytes are to come.
    Sized(u64),
    /// The end of the connection is the body's.
    UntilEnd,
    /// In a chunk's size, of which so many hexadecimal digits have come.
    Size {
        size: u64,
        digits: u8,
    },
    /// Behind a chunk's size, in blanks or extensions.
    Extension {
        size: u64,
        is_quiet: bool,
    },
    /// Before the line feed behind a chunk's size.
    SizeEnd(u64),
    /// In a chunk.
    Chunk(u64),
    /// Before the carriage return behind a chunk.
    ChunkReturn,
    /// Before the line feed behind a chunk.
    ChunkEnd,
    /// At the beginning of a line behind the last chunk.
    Trailer,
    /// In a trailer field, or before the line feed behind it.
    TrailerField,
    TrailerEnd,
    /// Before the very last line feed.
    LastEnd,
}

/// Finds the data in the bytes of a body.
#[derive(Clone, Debug)]
pub struct Decoder {
    state: State,
    /// Bytes since the last data that were none.
    overhead: usize,
}

impl Default for Decoder {
    /// Of a body that is over.
    fn default() -> Self {
        Self {
            state: State::Sized(0),
            overhead: 0,
        }
    }
}

impl Decoder {
    /// Whether the body is over.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        matches!(self.state, State::Sized(0))
    }

    /// How much data is still to come, if that is known.
    #[must_use]
    pub fn remaining(&self) -> Option<u64> {
        match self.state {
            State::Sized(left) => Some(left),
            _ => None,
        }
    }

    /// Appends the data in `bytes` to `data` and says how many bytes belong to the body: all, unless
    /// it is over before. Trailer fields are left out, see [`crate::body::RequestBody`].
    ///
    /// # Errors
    ///
    /// The chunks are none.
    pub fn decode(&mut self, bytes: &[u8], data: &mut Vec<u8>) -> Result<usize, Malformed> {
        let mut position = 0;
        while position < bytes.len() {
            let rest = &bytes[position..];
            match &mut self.state {
                State::Sized(0) => break,
                State::Sized(left) | State::Chunk(left) => {
                    let count =
                        usize::try_from(*left).map_or(rest.len(), |left| left.min(rest.len()));
                    data.extend_from_slice(&rest[..count]);
                    position += count;
                    *left -= count as u64;
                    self.overhead = 0;
                    if matches!(self.state, State::Chunk(0)) {
                        self.state = State::ChunkReturn;
                    }
                }
                State::UntilEnd => {
                    data.extend_from_slice(rest);
                    position = bytes.len();
                }
                _ => {
                    self.between_chunks(rest[0])?;
                    position += 1;
                    self.overhead += 1;
                    if self.overhead > MAX_OVERHEAD {
                        return Err(Malformed(
                            "a chunk's extensions or the trailer are too large",
                        ));
                    }
                }
            }
        }
        Ok(position)
    }

    /// Takes one byte that is no data (RFC 9112, section 7.1).
    fn between_chunks(&mut self, byte: u8) -> Result<(), Malformed> {
        let no_chunk = Malformed("the answer's chunks are malformed");
        self.state = match (self.state, byte) {
            (State::Size { size, digits }, _) if byte.is_ascii_hexdigit() => {
                // Sixteen digits are 64 bits.
                if digits == 16 {
                    return Err(no_chunk);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                State::Size {
                    size: size << 4 | u64::from(digit),
                    digits: digits + 1,
                }
            }
            (State::Size { digits: 0, .. }, _) => return Err(no_chunk),
            (State::Size { size, .. } | State::Extension { size, .. }, b'\r') => {
                State::SizeEnd(size)
            }
            (State::Size { size, .. }, b' ' | b'\t') => State::Extension {
                size,
                is_quiet: true,
            },
            (State::Extension { is_quiet: true, .. }, b' ' | b'\t') => self.state,
            (
                State::Size { size, .. }
                | State::Extension {
                    size,
                    is_quiet: true,
                },
                b';',
            ) => State::Extension {
                size,
                is_quiet: false,
            },
            (
                State::Extension {
                    is_quiet: false, ..
                },
                _,
            ) if byte != b'\n' => self.state,
            (State::SizeEnd(0), b'\n') => State::Trailer,
            (State::SizeEnd(size), b'\n') => State::Chunk(size),
            (State::ChunkReturn, b'\r') => State::ChunkEnd,
            (State::ChunkEnd, b'\n') => State::Size { size: 0, digits: 0 },
            (State::Trailer, b'\r') => State::LastEnd,
            (State::TrailerField, b'\r') => State::TrailerEnd,
            (State::Trailer | State::TrailerField, _) if byte != b'\n' => State::TrailerField,
            (State::TrailerEnd, b'\n') => State::Trailer,
            (State::LastEnd, b'\n') => State::Sized(0),
            _ => return Err(no_chunk),
        };
        Ok(())
    }

    /// The connection has ended: whether the body has, too.
    ///
    /// # Errors
    ///
    /// There was more of it to come.
    pub fn end(&mut self) -> Result<(), Malformed> {
        match self.state {
            State::Sized(0) | State::UntilEnd => {
                self.state = State::Sized(0);
                Ok(())
            }
            _ => Err(Malformed(
                "the upstream closed the connection within its answer",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a head and all behind it come to, however they are split: the status and the data, or why
    /// there is none.
    fn read(bytes: &[u8], size: usize) -> Result<(u16, Vec<u8>), Malformed> {
        let mut pieces = bytes.chunks(size);
        let mut unread = Vec::new();
        let mut head = None;
        let mut data = Vec::new();
        loop {
            let piece = pieces.next().unwrap_or_default();
            unread.extend_from_slice(piece);
            if head.is_none() {
                head = parse(&unread)?;
                if let Some(head) = &head {
                    unread.drain(..head.length);
                }
            }
            if let Some(head) = &mut head {
                let count = head.body.decode(&unread, &mut data)?;
                unread.drain(..count);
                if piece.is_empty() {
                    head.body.end()?;
                }
                if head.body.is_complete() {
                    return Ok((head.response.status().as_u16(), data));
                }
            } else if piece.is_empty() {
                return Err(Malformed("no head"));
            }
        }
    }

    #[test]
    fn bodies_end_where_their_heads_say_however_they_are_split() {
        let cases: [(&str, &str, &str); 14] = [
            ("a length", "Content-Length: 4\r\n\r\nmineNOT", "mine"),
            ("length 0", "content-length: 0\r\n\r\nNOT", ""),
            (
                "leading zeroes",
                "Content-Length: 004\r\n\r\nmineNOT",
                "mine",
            ),
            ("the end", "\r\nmine", "mine"),
            (
                "chunks",
                "Transfer-Encoding: chunked\r\n\r\n2\r\nmi\r\n2\r\nne\r\n0\r\n\r\nNOT",
                "mine",
            ),
            (
                "a coding in capitals",
                "TRANSFER-ENCODING: Chunked\r\n\r\n4\r\nmine\r\n0\r\n\r\nNOT",
                "mine",
            ),
            (
                "hexadecimal sizes",
                "Transfer-Encoding: chunked\r\n\r\nA\r\n0123456789\r\na\r\n0123456789\r\n000\r\n\r\n",
                "01234567890123456789",
            ),
            (
                "extensions",
                "Transfer-Encoding: chunked\r\n\r\n4;a\r\nmine\r\n0 \t;b=\";\"\r\n\r\nNOT",
                "mine",
            ),
            (
                "blanks behind a size",
                "Transfer-Encoding: chunked\r\n\r\n4 \t\r\nmine\r\n0\r\n\r\nNOT",
                "mine",
            ),
            (
                "trailer fields",
                "Transfer-Encoding: chunked\r\n\r\n4\r\nmine\r\n0\r\nA: b\r\nC: d\r\n\r\nNOT",
                "mine",
            ),
            (
                "line ends in a chunk",
                "Transfer-Encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n0\r\n\r\nNOT",
                "\r\n\r\n",
            ),
            (
                "the longest size",
                "Transfer-Encoding: chunked\r\n\r\n0000000000000004\r\nmine\r\n0\r\n\r\n",
                "mine",
            ),
            (
                "no chunk",
                "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nNOT",
                "",
            ),
            (
                "options",
                "Connection: close, x\r\nContent-Length: 1\r\n\r\nmNOT",
                "m",
            ),
        ];
        for (name, rest, data) in cases {
            let answer = format!("HTTP/1.1 200 OK\r\n{rest}");
            for size in 1..=answer.len() {
                let outcome = read(answer.as_bytes(), size);
                let expected = Ok((200, data.as_bytes().to_vec()));
                assert_eq!(outcome, expected, "{name}, {size} bytes at a time");
            }
        }
    }

    #[test]
    fn answers_that_can_be_read_in_two_ways_or_in_none_are_refused() {
        let long = |byte: &str| byte.repeat(MAX_OVERHEAD + 1);
        let chunked = |rest: &str| format!("Transfer-Encoding: chunked\r\n\r\n{rest}");
        let cases: [(&str, String); 32] = [
            (
                "both framings",
                "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            ),
            (
                "two lengths",
                "Content-Length: 4\r\nContent-Length: 4\r\n\r\nmine".into(),
            ),
            (
                "a list of lengths",
                "Content-Length: 4, 4\r\n\r\nmine".into(),
            ),
            ("a sign", "Content-Length: +4\r\n\r\nmine".into()),
            ("a negative length", "Content-Length: -4\r\n\r\nmine".into()),
            ("an empty length", "Content-Length:\r\n\r\n".into()),
            (
                "a hexadecimal length",
                "Content-Length: 0x4\r\n\r\nmine".into(),
            ),
            (
                "a length above 64 bits",
                "Content-Length: 18446744073709551616\r\n\r\n".into(),
            ),
            ("another coding", "Transfer-Encoding: gzip\r\n\r\n".into()),
            (
                "two codings",
                "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n".into(),
            ),
            (
                "chunked twice",
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            ),
            (
                "chunked as a parameter",
                "Transfer-Encoding: chunked;a\r\n\r\n0\r\n\r\n".into(),
            ),
            (
                "a length that is too short",
                "Content-Length: 5\r\n\r\nmine".into(),
            ),
            ("no last chunk", chunked("4\r\nmine\r\n")),
            ("half a chunk", chunked("5\r\nmine")),
            ("no size", chunked("\r\nmine\r\n0\r\n\r\n")),
            ("a size that is none", chunked("x\r\nmine\r\n0\r\n\r\n")),
            ("a prefix", chunked("0x4\r\nmine\r\n0\r\n\r\n")),
            (
                "a blank before the size",
                chunked(" 4\r\nmine\r\n0\r\n\r\n"),
            ),
            (
                "a size of 17 digits",
                chunked("00000000000000004\r\nmine\r\n0\r\n\r\n"),
            ),
            ("a size above 64 bits", chunked("10000000000000000\r\nmine")),
            ("a second size", chunked("4 4\r\nmine\r\n0\r\n\r\n")),
            (
                "a bare line feed behind a size",
                chunked("4\nmine\r\n0\r\n\r\n"),
            ),
            (
                "a bare line feed in an extension",
                chunked("4;a\nmine\r\n0\r\n\r\n"),
            ),
            ("a bare carriage return", chunked("4\rmine\r\n0\r\n\r\n")),
            (
                "a chunk that is too long",
                chunked("4\r\nmine!\r\n0\r\n\r\n"),
            ),
            (
                "a bare line feed behind a chunk",
                chunked("4\r\nmine\n0\r\n\r\n"),
            ),
            (
                "a bare line feed in the trailer",
                chunked("0\r\na: b\n\r\n"),
            ),
            ("a bare line feed at the end", chunked("0\r\n\n")),
            (
                "an extension without end",
                chunked(&format!("4;{}", long("x"))),
            ),
            (
                "a trailer without end",
                chunked(&format!("0\r\n{}", long("a:b\r\n"))),
            ),
            ("a size without end", chunked(&format!("4{}", long(" ")))),
        ];
        for (name, rest) in cases {
            let answer = format!("HTTP/1.1 200 OK\r\n{rest}");
            for size in [1, 2, 3, 7, answer.len()] {
                let outcome = read(answer.as_bytes(), size);
                assert!(
                    outcome.is_err(),
                    "{name}, {size} bytes at a time: {outcome:?}"
                );
            }
        }
    }

    #[test]
    fn some_statuses_never_have_a_body() {
        for status in [100, 103, 199, 204, 304] {
            let answer = format!("HTTP/1.1 {status} X\r\nContent-Length: 4\r\n\r\nNOT.");
            let outcome = read(answer.as_bytes(), answer.len());
            assert_eq!(outcome, Ok((status, Vec::new())));
        }
    }

    #[test]
    fn a_head_says_whether_the_connection_can_be_used_again() {
        let cases = [
            ("HTTP/1.1", "", true),
            ("HTTP/1.1", "Connection: keep-alive\r\n", true),
            ("HTTP/1.1", "Connection: close\r\n", false),
            (
                "HTTP/1.1",
                "Connection: x\r\nConnection: y, CLOSE ,z\r\n",
                false,
            ),
            ("HTTP/1.1", "Connection: closed\r\nX: close\r\n", true),
            ("HTTP/1.0", "Connection: keep-alive\r\n", false),
        ];
        for (version, field, is_persistent) in cases {
            let text = format!("{version} 200 OK\r\n{field}Content-Length: 0\r\n\r\n");
            let head = parse(text.as_bytes()).unwrap().unwrap();
            assert_eq!(head.is_persistent, is_persistent, "{text}");
        }
    }

    #[test]
    fn a_reason_phrase_is_kept_where_it_is_not_the_usual_one() {
        let cases = [
            ("200 OK", None),
            ("200 Fine", Some("Fine")),
            ("429", Some("")),
        ];
        for (line, expected) in cases {
            let text = format!("HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n");
            let head = parse(text.as_bytes()).unwrap().unwrap();
            let reason = head.response.extensions().get::<ReasonPhrase>();
            let expected = expected.map(str::as_bytes);
            assert_eq!(reason.map(ReasonPhrase::as_bytes), expected, "{line}");
        }
    }
}
