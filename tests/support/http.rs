//! HTTP/1.1 as bytes: heads kept exactly as they came, bodies taken apart strictly.

use std::io::{self, Read};

/// The head of a request or a response.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    /// Exactly what came, up to and including the empty line.
    pub(crate) raw: Vec<u8>,
    /// The first line.
    pub(crate) start: String,
    /// Names and values in order, as they came; a byte above 0x7f is the `char` of that number.
    pub(crate) fields: Vec<(String, String)>,
}

impl Head {
    fn parse(raw: Vec<u8>) -> io::Result<Self> {
        let text: String = raw.iter().map(|&byte| byte as char).collect();
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let fields = lines
            .map(|line| {
                let (name, value) = line.split_once(':').ok_or_else(|| bad("header", line))?;
                Ok((name.to_owned(), value.trim().to_owned()))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { raw, start, fields })
    }

    /// Every value of a header, in order.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let of_name = |(n, _): &&(String, String)| n.eq_ignore_ascii_case(name);
        self.fields
            .iter()
            .filter(of_name)
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// The value of a header that must not be there twice.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() < 2, "more than one {name}: {all:?}");
        all.first().copied()
    }

    /// Names in lower case with their values, sorted by name, repeated ones in their order.
    pub(crate) fn sorted(&self) -> Vec<(String, String)> {
        let mut fields: Vec<_> = self
            .fields
            .iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value.clone()))
            .collect();
        fields.sort_by(|a, b| a.0.cmp(&b.0));
        fields
    }

    /// The status of a response.
    pub(crate) fn status(&self) -> u16 {
        let status = self.start.split(' ').nth(1).and_then(|s| s.parse().ok());
        status.unwrap_or_else(|| panic!("no status in {:?}", self.start))
    }

    /// How the body of this message ends, given how it ends when no header says so.
    pub(crate) fn framing(&self, unsaid: Framing) -> Framing {
        match (self.get("transfer-encoding"), self.get("content-length")) {
            (Some(coding), None) if coding.eq_ignore_ascii_case("chunked") => Framing::Chunked,
            (None, Some(length)) => Framing::Length(length.parse().unwrap()),
            (None, None) => unsaid,
            other => panic!("framing that nobody should send: {other:?}"),
        }
    }
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// One end of a connection, read message by message.
pub(crate) struct Wire<S> {
    pub(crate) stream: S,
    unread: Vec<u8>,
    /// What is left of the body being read.
    pub(crate) body: Framing,
}

impl<S: Read> Wire<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self {
            stream,
            unread: Vec::new(),
            body: Framing::Length(0),
        }
    }

    /// Waits for more bytes; 0 is the end of the connection.
    fn fill(&mut self) -> io::Result<usize> {
        let mut piece = [0; 65536];
        let got = self.stream.read(&mut piece)?;
        self.unread.extend_from_slice(&piece[..got]);
        Ok(got)
    }

    fn fill_or_broken(&mut self) -> io::Result<()> {
        match self.fill()? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// The next head, or `None` at the end of a connection that ended between messages.
    pub(crate) fn head(&mut self) -> io::Result<Option<Head>> {
        loop {
            if let Some(at) = find(&self.unread, b"\r\n\r\n") {
                return Head::parse(self.take(at + 4)).map(Some);
            }
            if self.fill()? == 0 {
                return match self.unread.is_empty() {
                    true => Ok(None),
                    false => Err(io::ErrorKind::UnexpectedEof.into()),
                };
            }
        }
    }

    /// The next piece of the body: a whole chunk, or what has come; `None` after its proper end.
    pub(crate) fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        match self.body {
            Framing::Length(0) => Ok(None),
            Framing::Length(left) => {
                if self.unread.is_empty() {
                    self.fill_or_broken()?;
                }
                let now = self.unread.len().min(usize::try_from(left).unwrap());
                self.body = Framing::Length(left - now as u64);
                Ok(Some(self.take(now)))
            }
            Framing::UntilClose => match self.unread.is_empty() && self.fill()? == 0 {
                true => Ok(None),
                false => Ok(Some(std::mem::take(&mut self.unread))),
            },
            Framing::Chunked => {
                let line = self.line()?;
                let size =
                    usize::from_str_radix(&line, 16).map_err(|_| bad("chunk size", &line))?;
                while self.unread.len() < size {
                    self.fill_or_broken()?;
                }
                let chunk = self.take(size);
                match self.line()?.as_str() {
                    "" if size == 0 => {
                        self.body = Framing::Length(0);
                        Ok(None)
                    }
                    "" => Ok(Some(chunk)),
                    other => Err(bad("end of a chunk", other)),
                }
            }
        }
    }

    /// The rest of the body. An error if it breaks off before its proper end.
    pub(crate) fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(piece) = self.piece()? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    /// Everything that still comes before the connection ends, however it ends.
    pub(crate) fn until_closed(&mut self) -> io::Result<Vec<u8>> {
        loop {
            match self.fill() {
                Ok(0) => return Ok(std::mem::take(&mut self.unread)),
                Ok(_) => {}
                Err(error) if is_closed(&error) => return Ok(std::mem::take(&mut self.unread)),
                Err(error) => return Err(error),
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(at) = find(&self.unread, b"\r\n") {
                let mut line = self.take(at + 2);
                line.truncate(at);
                return String::from_utf8(line).map_err(|_| bad("line", "not UTF-8"));
            }
            self.fill_or_broken()?;
        }
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let rest = self.unread.split_off(count);
        std::mem::replace(&mut self.unread, rest)
    }
}

/// Whether an error of a read or write means that the other end is gone, rather than that nothing came in time.
pub(crate) fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(
        error.kind(),
        BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof
    )
}

/// Where `needle` begins in `hay`.
pub(crate) fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len())
        .position(|window| window == needle)
}

fn bad(what: &str, text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {text:?}"))
}
