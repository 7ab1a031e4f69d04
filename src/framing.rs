//! A second look at request heads, for two things that hyper doesn't show.
//!
//! hyper resolves a request with both `Transfer-Encoding` and `Content-Length`, or with the same
//! length twice, by dropping what is too much, and a target with a fragment by dropping that. All are
//! allowed and all are wrong here: the first are how requests are smuggled (RFC 9112, section 11.2),
//! and the last is no origin-form target (section 3.2.1), so not the one that is forwarded.

/// What the heads seen so far on one connection give cause for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// A head had `Content-Length` together with `Transfer-Encoding`, or twice.
    pub two_framings: bool,
    /// A request target had a fragment.
    pub fragment: bool,
    /// A body came in chunks. Where it ends is not followed here, so the connection must not be used
    /// for another request.
    pub chunked: bool,
}

impl Findings {
    /// Whether the connection must not be used for another request.
    #[must_use]
    pub fn must_close(self) -> bool {
        self.two_framings || self.fragment || self.chunked
    }
}

/// Where in a connection's bytes the scanner is.
enum Place {
    /// Before or in the request line.
    RequestLine,
    /// In the header section.
    Headers,
    /// In a body with so many bytes to come.
    Body(u64),
    /// In a chunked body, and not following.
    Chunks,
}

/// Follows the bytes of one connection, however they are split.
///
/// It never decides what a request is: that is hyper's. If the two disagree on where a head begins,
/// this one finds nothing or too much, and what goes upstream is still only what hyper understood.
pub struct Scanner {
    place: Place,
    /// The beginning of a line that was split over reads.
    line: Vec<u8>,
    length: Option<u64>,
    findings: Findings,
}

impl Default for Scanner {
    fn default() -> Self {
        Self {
            place: Place::RequestLine,
            line: Vec::new(),
            length: None,
            findings: Findings::default(),
        }
    }
}

impl Scanner {
    /// What was found so far.
    #[must_use]
    pub fn findings(&self) -> Findings {
        self.findings
    }

    /// Whether a head has begun and not ended.
    #[must_use]
    pub fn is_in_head(&self) -> bool {
        matches!(self.place, Place::Headers) || !self.line.is_empty()
    }

    /// Whether a body has begun and, as far as is known here, not ended.
    #[must_use]
    pub fn is_in_body(&self) -> bool {
        matches!(self.place, Place::Body(_) | Place::Chunks)
    }

    /// Takes the next bytes of the connection.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match self.place {
                Place::Chunks => return,
                Place::Body(left) => {
                    let taken =
                        usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
                    bytes = &bytes[taken..];
                    let left = left - taken as u64;
                    self.place = if left == 0 {
                        Place::RequestLine
                    } else {
                        Place::Body(left)
                    };
                }
                Place::RequestLine | Place::Headers => {
                    match bytes.iter().position(|&byte| byte == b'\n') {
                        None => {
                            self.line.extend_from_slice(bytes);
                            return;
                        }
                        Some(newline) if self.line.is_empty() => {
                            self.line(&bytes[..newline]);
                            bytes = &bytes[newline + 1..];
                        }
                        Some(newline) => {
                            let mut line = std::mem::take(&mut self.line);
                            line.extend_from_slice(&bytes[..newline]);
                            self.line(&line);
                            bytes = &bytes[newline + 1..];
                        }
                    }
                }
            }
        }
    }

    fn line(&mut self, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match self.place {
            // Empty lines before a request are skipped (RFC 9112, section 2.2).
            Place::RequestLine if line.is_empty() => {}
            Place::RequestLine => {
                self.findings.fragment |= line.contains(&b'#');
                self.length = None;
                self.findings.chunked = false;
                self.place = Place::Headers;
            }
            _ if line.is_empty() => {
                self.findings.two_framings |= self.findings.chunked && self.length.is_some();
                self.place = match self.length {
                    _ if self.findings.chunked => Place::Chunks,
                    Some(length) if length > 0 => Place::Body(length),
                    _ => Place::RequestLine,
                };
            }
            _ => {
                let Some(colon) = line.iter().position(|&byte| byte == b':') else {
                    return;
                };
                let (name, value) = (&line[..colon], &line[colon + 1..]);
                if name.eq_ignore_ascii_case(b"transfer-encoding") {
                    self.findings.chunked = true;
                } else if name.eq_ignore_ascii_case(b"content-length") {
                    let length = std::str::from_utf8(value.trim_ascii())
                        .ok()
                        .and_then(|value| value.parse().ok());
                    self.findings.two_framings |= self.length.is_some();
                    self.length = Some(length.unwrap_or(0));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The findings for `bytes` given in pieces of `size`.
    fn scan(bytes: &[u8], size: usize) -> Findings {
        let mut scanner = Scanner::default();
        bytes.chunks(size).for_each(|piece| scanner.feed(piece));
        scanner.findings()
    }

    #[test]
    fn finds_what_hyper_hides_however_it_is_split() {
        let nothing = Findings::default();
        let chunked = Findings {
            chunked: true,
            ..nothing
        };
        let both = Findings {
            two_framings: true,
            ..chunked
        };
        let twice = Findings {
            two_framings: true,
            ..nothing
        };
        let fragment = Findings {
            fragment: true,
            ..nothing
        };
        let cases: [(&str, &str, Findings); 11] = [
            (
                "plain",
                "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\na#b",
                nothing,
            ),
            ("no body", "GET / HTTP/1.1\r\nX: #\r\n\r\n", nothing),
            (
                "chunked",
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                chunked,
            ),
            (
                "length first",
                "POST / HTTP/1.1\r\nContent-Length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
                both,
            ),
            (
                "coding first",
                "POST / HTTP/1.1\r\nTRANSFER-ENCODING: chunked\r\nContent-length:3\r\n\r\n",
                both,
            ),
            (
                "bare LF",
                "POST / HTTP/1.1\nTransfer-Encoding: chunked\nContent-Length: 3\n\n",
                both,
            ),
            (
                "fragment",
                "POST /v1/responses#x HTTP/1.1\r\n\r\n",
                fragment,
            ),
            (
                "fragment after a body",
                "POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n\r\nPOST /#x HTTP/1.1\r\n\r\n",
                fragment,
            ),
            (
                "a head as a body",
                "POST / HTTP/1.1\r\nContent-Length: 13\r\n\r\nPOST /# HTTP/\r\n",
                nothing,
            ),
            (
                "the same length twice",
                "POST / HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
                twice,
            ),
            (
                "a bad length",
                "POST / HTTP/1.1\r\nContent-Length: x\r\nTransfer-Encoding: chunked\r\n\r\n",
                both,
            ),
        ];
        for (name, bytes, expected) in cases {
            for size in 1..=bytes.len() {
                assert_eq!(
                    scan(bytes.as_bytes(), size),
                    expected,
                    "{name}, {size} bytes at a time"
                );
            }
        }
    }
}
