//! The log line of a forwarded request.

use std::{borrow::Cow, cell::Cell, time::Instant};

use crate::{error::ErrorReply, log};

/// The line, written when the entry is dropped: however a request ends, it is logged.
pub(super) struct AccessLogEntry {
    uid: Option<u32>,
    started: Instant,
    /// How many bytes of bodies, or through a tunnel, have come from the client and gone to it.
    pub(super) received: Cell<usize>,
    pub(super) sent: Cell<usize>,
    /// The response's status; 0 before there is one.
    pub(super) status: Cell<u16>,
    /// Why the response isn't whole. Details are for the log alone.
    pub(super) error: Cell<Option<Cow<'static, str>>>,
}

impl AccessLogEntry {
    /// An entry for a request that begins now.
    pub(super) fn new(uid: Option<u32>) -> Self {
        Self {
            uid,
            started: Instant::now(),
            received: Cell::new(0),
            sent: Cell::new(0),
            status: Cell::new(0),
            // hyper drops whatever belongs to a client that leaves, and says nothing.
            error: Cell::new(Some(Cow::Borrowed("client left"))),
        }
    }

    /// The response is this one instead of the upstream's.
    pub(super) fn fail(&self, reply: &ErrorReply) {
        self.status.set(reply.status.as_u16());
        let error = match reply.detail.as_str() {
            "" => reply.message.into(),
            detail => format!("{}: {detail}", reply.message).into(),
        };
        self.error.set(Some(error));
    }
}

impl Drop for AccessLogEntry {
    fn drop(&mut self) {
        let (uid, status) = (log::uid(self.uid), self.status.get());
        let (received, sent) = (self.received.get(), self.sent.get());
        let ms = self.started.elapsed().as_millis();
        let error = self.error.take();
        let error = error.map_or_else(String::new, |error| format!(" error={error:?}"));
        log!("request uid={uid} status={status} ms={ms} in={received} out={sent}{error}");
    }
}
