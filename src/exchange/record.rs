//! The line in the log that is left of an exchange.

use std::rc::Rc;
use std::time::Instant;

use hyper::StatusCode;

use super::client::Client;
use super::dump::Tap;
use crate::log;

/// What is logged of one forwarded request, when it is over, however it ends.
pub(super) struct Record {
    client: Rc<Client>,
    started: Instant,
    status: u16,
    sent: usize,
    /// Takes a copy of the answer.
    tap: Option<Tap>,
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
            tap: None,
            // So it is until something else is.
            error: Some("client left".into()),
        }
    }

    /// Whose request it is.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The answer has this status, and a copy of its body is taken.
    pub(super) fn begin(&mut self, status: StatusCode, tap: Option<Tap>) {
        self.status = status.as_u16();
        self.tap = tap;
    }

    /// Its body goes on with this.
    pub(super) fn data(&mut self, data: &[u8]) {
        self.sent += data.len();
        if let Some(tap) = &mut self.tap {
            tap.data(data);
        }
    }

    /// The answer is whole, or something failed.
    pub(super) fn end(&mut self, error: Option<String>) {
        self.error = error;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (uid, status, sent) = (log::uid(self.client.uid), self.status, self.sent);
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
