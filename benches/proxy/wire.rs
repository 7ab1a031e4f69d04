//! What load generator and stand-in upstream say to each other through whichever proxy is between them.

use std::time::{SystemTime, UNIX_EPOCH};

/// The key that every proxy adds; the upstream refuses requests without it.
pub(crate) const KEY: &str = "sk-bench-0123456789abcdef0123456789abcdef0123456789abcdef";

/// The name in the upstream's certificate.
pub(crate) const HOST: &str = "localhost";

/// The body of a small request and of its answer, in bytes.
pub(crate) const BODY_BYTES: usize = 1 << 10;

/// One event of a stream, in bytes: about what the Responses API sends for a word.
pub(crate) const EVENT_BYTES: usize = 256;

/// Digits of a stamp: nanoseconds since 1970, until the year 2286.
pub(crate) const STAMP_DIGITS: usize = 19;

/// Where in an event its stamp is.
pub(crate) const EVENT_STAMP_AT: usize = EVENT_HEAD.len();

/// The header that tells the upstream what to do.
pub(crate) const TASK_HEADER: &str = "x-bench";

const EVENT_HEAD: &str =
    "event: response.output_text.delta\ndata: {\"type\":\"response.output_text.delta\",\"sent\":\"";
const EVENT_FILL: &str = "\",\"delta\":\"";
const EVENT_TAIL: &str = "\"}\n\n";

/// What the upstream is to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// The whole body taken, then [`BODY_BYTES`] that begin with the stamp of the body's first byte.
    Answer,
    /// One event at a time, at the upstream's pace, until the client leaves.
    Stream,
    /// One event each time that the upstream is told to, see [`crate::upstream::Upstream::step`].
    Step,
    /// Some events, then silence until the client leaves.
    Hold,
}

impl Task {
    const ALL: [(Self, &'static str); 4] = [
        (Self::Answer, "answer"),
        (Self::Stream, "stream"),
        (Self::Step, "step"),
        (Self::Hold, "hold"),
    ];

    pub(crate) fn name(self) -> &'static str {
        let named = Self::ALL.iter().find(|(task, _)| *task == self);
        named.expect("every task is listed").1
    }

    pub(crate) fn parse(name: &[u8]) -> Option<Self> {
        let named = Self::ALL.iter().find(|(_, other)| other.as_bytes() == name);
        named.map(|(task, _)| *task)
    }
}

/// Nanoseconds since 1970. The clock is the same for all processes of the machine.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(0))
}

/// Reads a stamp of [`STAMP_DIGITS`].
pub(crate) fn stamp(bytes: &[u8]) -> Option<u64> {
    let digits = bytes.get(..STAMP_DIGITS)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// An event stamped now.
pub(crate) fn event() -> Vec<u8> {
    let mut event = format!("{EVENT_HEAD}{:019}{EVENT_FILL}", now()).into_bytes();
    event.resize(EVENT_BYTES - EVENT_TAIL.len(), b'x');
    event.extend_from_slice(EVENT_TAIL.as_bytes());
    event
}

/// A request as Codex makes it, in headers and their number.
pub(crate) fn request_head(port: u16, task: Task, length: usize) -> Vec<u8> {
    format!(
        "POST /v1/responses HTTP/1.1\r\n\
         host: 127.0.0.1:{port}\r\n\
         content-type: application/json\r\n\
         accept: text/event-stream\r\n\
         user-agent: codex_cli_rs/0.0.0 (Linux; x86_64) unknown\r\n\
         originator: codex_cli_rs\r\n\
         openai-beta: responses=experimental\r\n\
         session_id: 01890a5d-ac96-774b-bcce-b302099a8057\r\n\
         conversation_id: 01890a5d-ac96-774b-bcce-b302099a8057\r\n\
         {TASK_HEADER}: {}\r\n\
         content-length: {length}\r\n\r\n",
        task.name()
    )
    .into_bytes()
}

/// A small request whole.
pub(crate) fn small_request(port: u16, task: Task) -> Vec<u8> {
    let mut request = request_head(port, task, BODY_BYTES);
    request.resize(request.len() + BODY_BYTES, b'x');
    request
}

/// The end of the head in `bytes`, behind its empty line.
pub(crate) fn head_end(bytes: &[u8]) -> Option<usize> {
    let blank = b"\r\n\r\n";
    let start = bytes
        .windows(blank.len())
        .position(|window| window == blank)?;
    Some(start + blank.len())
}

/// The value of the header `name` in a head.
pub(crate) fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a [u8]> {
    head.split(|&byte| byte == b'\n').find_map(|line| {
        let (found, value) = line.split_at_checked(name.len())?;
        let value = value.strip_prefix(b":")?;
        found
            .eq_ignore_ascii_case(name.as_bytes())
            .then(|| value.trim_ascii())
    })
}

/// The content length in a head.
pub(crate) fn content_length(head: &[u8]) -> Option<usize> {
    let value = std::str::from_utf8(header(head, "content-length")?).ok()?;
    value.parse().ok()
}

/// Takes a chunked body apart, however it is split.
#[derive(Default)]
pub(crate) struct Chunks {
    /// Bytes of the chunk under way that are to come.
    left: usize,
    /// Of a chunk's size line, what has come.
    line: Vec<u8>,
    ended: bool,
}

impl Chunks {
    /// Appends the data in `bytes` to `data`; false once the last chunk has come.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], data: &mut Vec<u8>) -> bool {
        while !bytes.is_empty() && !self.ended {
            let taken = self.left.min(bytes.len());
            data.extend_from_slice(&bytes[..taken]);
            self.left -= taken;
            bytes = &bytes[taken..];
            while self.left == 0
                && let Some((&byte, rest)) = bytes.split_first()
            {
                bytes = rest;
                match byte {
                    b'\r' => {}
                    // The line end behind a chunk's data.
                    b'\n' if self.line.is_empty() => {}
                    b'\n' => {
                        let line = std::mem::take(&mut self.line);
                        let digits = std::str::from_utf8(&line).unwrap_or_default();
                        self.left = usize::from_str_radix(digits, 16).unwrap_or(0);
                        self.ended = self.left == 0;
                        if self.ended {
                            return false;
                        }
                    }
                    byte => self.line.push(byte),
                }
            }
        }
        !self.ended
    }
}
