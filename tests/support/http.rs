//! HTTP/1.1 as bytes: heads kept exactly as they came, bodies taken apart strictly.

use std::io::{self, BufRead, BufReader, Read};
use std::time::Duration;

/// How long anything that must happen may take. Only a test that fails waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, Default)]
pub(crate) struct Head {
    pub(crate) start: String,
    /// Names and values in order, as they came; a byte above 0x7f is the `char` of that number.
    pub(crate) fields: Vec<(String, String)>,
}

impl Head {
    fn parse(raw: &[u8]) -> io::Result<Self> {
        let text: String = raw.iter().map(|&byte| byte as char).collect();
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let fields = lines
            .map(|line| {
                let (name, value) = line.split_once(':').ok_or_else(|| bad("header", line))?;
                Ok((name.to_owned(), value.trim().to_owned()))
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { start, fields })
    }

    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.fields.iter();
        let of_name = fields.filter(|(other, _)| other.eq_ignore_ascii_case(name));
        of_name.map(|(_, value)| value.as_str()).collect()
    }

    /// The value of a header that must not be there twice.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() < 2, "more than one {name}: {all:?}");
        all.first().copied()
    }

    /// `name: value` for each header, the name in lower case, sorted by name, repeated ones in their order.
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

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// One end of a connection, read message by message.
pub(crate) struct Wire<S> {
    pub(crate) reader: BufReader<S>,
    /// What is left of the body being read.
    pub(crate) body: Framing,
}

impl<S: Read> Wire<S> {
    pub(crate) fn new(stream: S) -> Self {
        let reader = BufReader::with_capacity(1 << 16, stream);
        let body = Framing::Length(0);
        Self { reader, body }
    }

    /// The next head, or `None` at the end of a connection that ended between messages.
    pub(crate) fn head(&mut self) -> io::Result<Option<Head>> {
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

    /// The next piece of the body: a whole chunk, or what has come; `None` after its proper end.
    pub(crate) fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        let most = match self.body {
            Framing::Length(0) => return Ok(None),
            Framing::Length(left) => left,
            Framing::UntilClose => u64::MAX,
            Framing::Chunked => return self.chunk(),
        };
        let come = self.reader.fill_buf()?;
        let count = come.len().min(usize::try_from(most).unwrap());
        let piece = come[..count].to_vec();
        self.reader.consume(count);
        match &mut self.body {
            Framing::Length(_) if count == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Framing::Length(left) => *left -= count as u64,
            _ if count == 0 => return Ok(None),
            _ => {}
        }
        Ok(Some(piece))
    }

    fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line()?;
        let size = usize::from_str_radix(&line, 16).map_err(|_| bad("chunk size", &line))?;
        let mut chunk = vec![0; size];
        self.reader.read_exact(&mut chunk)?;
        match self.line()?.as_str() {
            "" if size == 0 => self.body = Framing::Length(0),
            "" => return Ok(Some(chunk)),
            other => return Err(bad("end of a chunk", other)),
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

    /// The rest of the body. An error if it breaks off before its proper end.
    pub(crate) fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(piece) = self.piece()? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    /// Exactly this many of the bytes that follow a message, on a connection that was upgraded.
    pub(crate) fn receive(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Everything that still comes before the connection ends, however it ends.
    pub(crate) fn until_closed(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        match self.reader.read_to_end(&mut all) {
            Err(error) if !is_closed(&error) => Err(error),
            _ => Ok(all),
        }
    }
}

/// Whether an error of a read or write means that the other end is gone, rather than that nothing came in time.
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

/// A chunk of a body; an empty one ends it.
pub(crate) fn chunk(data: &[u8]) -> Vec<u8> {
    [format!("{:x}\r\n", data.len()).as_bytes(), data, b"\r\n"].concat()
}

fn bad(what: &str, text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what}: {text:?}"))
}
