//! A strict HTTP/1.1 parser that keeps heads exactly as they were received.

use std::io::{self, BufRead, BufReader, Read};
use std::time::Duration;

/// Timeout for every expected event. Only a failing test waits this long.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, Default)]
pub(crate) struct Head {
    pub(crate) start: String,
    /// Names and values in the order received. A byte above 0x7f is the `char` with that number.
    pub(crate) fields: Vec<(String, String)>,
}

impl Head {
    fn parse(raw: &[u8]) -> io::Result<Self> {
        let text: String = raw.iter().map(|&byte| byte as char).collect();
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let fields = lines
            .map(|line| {
                let (name, value) = line
                    .split_once(':')
                    .ok_or_else(|| invalid("header", line))?;
                Ok((name.to_owned(), value.trim().to_owned()))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { start, fields })
    }

    /// The values of all header fields with this name, in order.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.fields.iter();
        let matching = fields.filter(|(other, _)| other.eq_ignore_ascii_case(name));
        matching.map(|(_, value)| value.as_str()).collect()
    }

    /// The value of a header field. Panics if there are several.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() < 2, "more than one {name}: {all:?}");
        all.first().copied()
    }

    /// `name: value` for each header field, in lower case, sorted by name. Repeated fields keep their order.
    pub(crate) fn sorted(&self) -> Vec<String> {
        let mut fields = self.fields.clone();
        fields.iter_mut().for_each(|f| f.0.make_ascii_lowercase());
        fields.sort_by(|a, b| a.0.cmp(&b.0));
        let line = |(name, value)| format!("{name}: {value}");
        fields.into_iter().map(line).collect()
    }

    pub(crate) fn status(&self) -> u16 {
        let status = self.start.split(' ').nth(1).and_then(|s| s.parse().ok());
        status.unwrap_or_else(|| panic!("no status in {:?}", self.start))
    }

    /// The framing of the body. `default` applies if no header field says otherwise.
    pub(crate) fn framing(&self, default: Framing) -> Framing {
        match (self.get("transfer-encoding"), self.get("content-length")) {
            (Some(coding), None) if coding.eq_ignore_ascii_case("chunked") => Framing::Chunked,
            (None, Some(length)) => Framing::Length(length.parse().unwrap()),
            (None, None) => default,
            other => panic!("ambiguous framing: {other:?}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// One end of a connection, read one HTTP message at a time.
pub(crate) struct HttpStream<S> {
    pub(crate) reader: BufReader<S>,
    /// What remains of the current body.
    pub(crate) body: Framing,
}

impl<S: Read> HttpStream<S> {
    pub(crate) fn new(stream: S) -> Self {
        let reader = BufReader::with_capacity(1 << 16, stream);
        let body = Framing::Length(0);
        Self { reader, body }
    }

    /// The next head, or `None` if the connection was closed between messages.
    pub(crate) fn read_head(&mut self) -> io::Result<Option<Head>> {
        let mut raw = Vec::new();
        while !raw.ends_with(b"\r\n\r\n") {
            match self.reader.read_until(b'\n', &mut raw)? {
                0 if raw.is_empty() => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => {}
            }
        }
        Head::parse(&raw).map(Some)
    }

    /// The next part of the body: a whole chunk, or the bytes available. `None` at the end of the body, an error if it
    /// is truncated.
    pub(crate) fn read_part(&mut self) -> io::Result<Option<Vec<u8>>> {
        let remaining = match self.body {
            Framing::Length(0) => return Ok(None),
            Framing::Length(left) => left,
            Framing::UntilClose => u64::MAX,
            Framing::Chunked => return self.chunk(),
        };
        let available = self.reader.fill_buf()?;
        let count = available.len().min(usize::try_from(remaining).unwrap());
        let part = available[..count].to_vec();
        self.reader.consume(count);
        match &mut self.body {
            Framing::Length(_) if count == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Framing::Length(left) => *left -= count as u64,
            _ if count == 0 => return Ok(None),
            _ => {}
        }
        Ok(Some(part))
    }

    fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line()?;
        let size = usize::from_str_radix(&line, 16).map_err(|_| invalid("chunk size", &line))?;
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk)?;
        match self.line()?.as_str() {
            "" if size == 0 => self.body = Framing::Length(0),
            "" => return Ok(Some(chunk)),
            other => return Err(invalid("end of a chunk", other)),
        }
        Ok(None)
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        let end = line.strip_suffix("\r\n").map(str::len);
        line.truncate(end.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(line)
    }

    /// The rest of the body. An error if it is truncated.
    pub(crate) fn read_rest(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(part) = self.read_part()? {
            all.extend_from_slice(&part);
        }
        Ok(all)
    }

    /// Reads exactly this many bytes after the last message on an upgraded connection.
    pub(crate) fn read_bytes(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads until the connection is closed or reset.
    pub(crate) fn read_until_closed(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        match self.reader.read_to_end(&mut all) {
            Err(error) if !is_closed(&error) => Err(error),
            _ => Ok(all),
        }
    }
}

/// Whether an I/O error means that the peer closed the connection. A timeout does not.
pub(crate) fn is_closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    [
        BrokenPipe,
        ConnectionAborted,
        ConnectionReset,
        UnexpectedEof,
    ]
    .contains(&error.kind())
}

/// Encodes a chunk of a body; an empty one ends the body.
pub(crate) fn chunk(data: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}

fn invalid(what: &str, text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {text:?}"))
}
