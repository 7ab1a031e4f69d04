//! Lines on stderr: what an operator needs, and nothing of what was said.

use std::fmt;
use std::io::Write;
use std::rc::Rc;
use std::time::Instant;

use crate::body::RequestState;
use crate::connector::with_sources;
use crate::link::ExchangeError;

/// Writes one line in one write(2), so that lines never mix.
///
/// A stderr that can't be written to is no reason to end.
pub fn line(text: fmt::Arguments<'_>) {
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// A uid in a log line, or `-` where it isn't known.
pub struct Uid(pub Option<u32>);

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(uid) => uid.fmt(f),
            None => f.write_str("-"),
        }
    }
}

/// How an exchange ended.
enum End {
    /// The client left before the answer, or before its end. Also what is so until something else is.
    ClientLeft,
    /// With the whole answer.
    Complete,
    /// Something failed; the detail is for the log alone.
    Failed(String),
}

/// What is logged of one forwarded request, when it is over, however it ends.
pub struct Record {
    uid: Option<u32>,
    started: Instant,
    request: Rc<RequestState>,
    status: u16,
    sent: u64,
    end: End,
}

impl Record {
    /// Begins now.
    #[must_use]
    pub fn new(uid: Option<u32>, request: Rc<RequestState>) -> Self {
        Self {
            uid,
            started: Instant::now(),
            request,
            status: 0,
            sent: 0,
            end: End::ClientLeft,
        }
    }

    /// The request that this is about.
    #[must_use]
    pub fn request(&self) -> &RequestState {
        &self.request
    }

    /// The answer has this status.
    pub fn status(&mut self, status: u16) {
        self.status = status;
    }

    /// So many bytes of the answer's body have come.
    pub fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// The answer is whole.
    pub fn complete(&mut self) {
        self.end = End::Complete;
    }

    /// The upstream broke its answer off.
    pub fn broken_off(&mut self, error: &ExchangeError) {
        self.end = End::Failed(format!("answer broken off: {}", with_sources(error)));
    }

    /// There was no answer.
    pub fn failed(&mut self, status: u16, detail: String) {
        self.status = status;
        self.end = End::Failed(detail);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (uid, status, sent) = (Uid(self.uid), self.status, self.sent);
        let milliseconds = self.started.elapsed().as_millis();
        let received = self.request.bytes();
        let figures = format_args!(
            "request uid={uid} status={status} ms={milliseconds} in={received} out={sent}"
        );
        match &self.end {
            End::Complete => line(format_args!("{figures}")),
            End::ClientLeft => line(format_args!("{figures} error=\"client left\"")),
            End::Failed(detail) => line(format_args!("{figures} error={detail:?}")),
        }
    }
}
