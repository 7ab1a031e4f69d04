//! The log line of a forwarded request.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use crate::log;

/// How many bytes of bodies, or through a tunnel, have come from the client and gone to it.
#[derive(Default)]
pub(super) struct Traffic {
    pub(super) received: Cell<usize>,
    pub(super) sent: Cell<usize>,
}

/// The line, written when the entry is dropped: however a request ends, it is logged.
pub(super) struct AccessLogEntry {
    uid: Option<u32>,
    started: Instant,
    traffic: Rc<Traffic>,
    /// The response's status; 0 before there is one.
    pub(super) status: u16,
    /// Why the response isn't whole. Details are for the log alone.
    pub(super) error: Option<String>,
}

impl AccessLogEntry {
    /// An entry for a request that begins now.
    pub(super) fn new(uid: Option<u32>, traffic: Rc<Traffic>) -> Self {
        Self {
            uid,
            started: Instant::now(),
            traffic,
            status: 0,
            // hyper drops whatever belongs to a client that leaves, and says nothing.
            error: Some("client left".into()),
        }
    }
}

impl Drop for AccessLogEntry {
    fn drop(&mut self) {
        let (uid, status) = (log::uid(self.uid), self.status);
        let (received, sent) = (self.traffic.received.get(), self.traffic.sent.get());
        let milliseconds = self.started.elapsed().as_millis();
        let error = self.error.iter().map(|error| format!(" error={error:?}"));
        let error: String = error.collect();
        log::line(format_args!(
            "request uid={uid} status={status} ms={milliseconds} in={received} out={sent}{error}"
        ));
    }
}
