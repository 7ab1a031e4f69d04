//! The line in the log that is left of an exchange.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use super::dump::Tap;
use crate::log;

/// What is logged of one forwarded request, when it is over, however it ends.
pub(super) struct Record {
    uid: Option<u32>,
    started: Instant,
    /// Of the answer; 0 before there is one.
    pub(super) status: u16,
    /// How many bytes of the request's body have come.
    pub(super) received: Rc<Cell<usize>>,
    /// How many bytes of the answer's body have gone out.
    pub(super) sent: usize,
    /// Takes a copy of the answer.
    pub(super) tap: Option<Tap>,
    /// Why the answer isn't whole; the detail is for the log alone.
    pub(super) error: Option<String>,
}

impl Record {
    /// Begins now.
    pub(super) fn new(uid: Option<u32>, received: Rc<Cell<usize>>) -> Self {
        Self {
            uid,
            received,
            started: Instant::now(),
            status: 0,
            sent: 0,
            tap: None,
            // So it is until something else is.
            error: Some("client left".into()),
        }
    }

    /// Its body goes on with this.
    pub(super) fn data(&mut self, data: &[u8]) {
        self.sent += data.len();
        if let Some(tap) = &mut self.tap {
            tap.data(data);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (uid, status, sent) = (log::uid(self.uid), self.status, self.sent);
        let milliseconds = self.started.elapsed().as_millis();
        let received = self.received.get();
        let error = self.error.iter().map(|error| format!(" error={error:?}"));
        let error: String = error.collect();
        log::line(format_args!(
            "request uid={uid} status={status} ms={milliseconds} in={received} out={sent}{error}"
        ));
    }
}
