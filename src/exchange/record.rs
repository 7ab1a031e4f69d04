//! The line in the log that is left of an exchange.

use std::rc::Rc;
use std::time::Instant;

use super::client::Client;
use crate::log::{self, Uid, with_sources};

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
pub(super) struct Record {
    client: Rc<Client>,
    started: Instant,
    status: u16,
    sent: u64,
    end: End,
}

impl Record {
    /// Begins now.
    pub(super) fn new(client: Rc<Client>) -> Self {
        Self {
            client,
            started: Instant::now(),
            status: 0,
            sent: 0,
            end: End::ClientLeft,
        }
    }

    /// Whose request it is.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The answer has this status.
    pub(super) fn status(&mut self, status: u16) {
        self.status = status;
    }

    /// So many bytes of the answer's body have come.
    pub(super) fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// The answer is whole.
    pub(super) fn complete(&mut self) {
        self.end = End::Complete;
    }

    /// The upstream broke its answer off.
    pub(super) fn broken_off(&mut self, error: &hyper::Error) {
        self.end = End::Failed(format!("answer broken off: {}", with_sources(error)));
    }

    /// There was no answer.
    pub(super) fn failed(&mut self, status: u16, detail: String) {
        self.status = status;
        self.end = End::Failed(detail);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (uid, status, sent) = (Uid(self.client.uid), self.status, self.sent);
        let milliseconds = self.started.elapsed().as_millis();
        let received = self.client.received.get();
        let figures = format_args!(
            "request uid={uid} status={status} ms={milliseconds} in={received} out={sent}"
        );
        match &self.end {
            End::Complete => log::line(format_args!("{figures}")),
            End::ClientLeft => log::line(format_args!("{figures} error=\"client left\"")),
            End::Failed(detail) => log::line(format_args!("{figures} error={detail:?}")),
        }
    }
}
