//! The line in the log that is left of an exchange.

use std::rc::Rc;
use std::time::Instant;

use super::client::Client;
use crate::log::{self, Uid};

/// What is logged of one forwarded request, when it is over, however it ends.
pub(super) struct Record {
    client: Rc<Client>,
    started: Instant,
    status: u16,
    sent: usize,
    /// Why it isn't complete; the detail is for the log alone.
    error: Option<String>,
}

impl Record {
    /// Begins now.
    pub(super) fn new(client: Rc<Client>) -> Self {
        Self {
            client,
            started: Instant::now(),
            status: 0,
            sent: 0,
            // So it is until something else is.
            error: Some("client left".into()),
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
    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
    }

    /// The answer is whole, or something failed.
    pub(super) fn ended(&mut self, error: Option<String>) {
        self.error = error;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (uid, status, sent) = (Uid(self.client.uid), self.status, self.sent);
        let milliseconds = self.started.elapsed().as_millis();
        let received = self.client.received.get();
        let error = self.error.as_ref();
        let error = error
            .map(|error| format!(" error={error:?}"))
            .unwrap_or_default();
        log::line(format_args!(
            "request uid={uid} status={status} ms={milliseconds} in={received} out={sent}{error}"
        ));
    }
}
