//! State shared by a client connection and its current request.

use std::cell::Cell;
use std::task::{Context, Poll, Waker};

use hyper::Version;

use super::tunnel::Tunnel;
use crate::error::ErrorReply;

/// The process at the other end of a client connection.
#[derive(Clone, Copy, Default)]
pub(crate) struct Peer {
    /// Its uid, if the kernel was queried.
    pub(crate) uid: Option<u32>,
    /// The response to its requests, if its user may not be served.
    pub(crate) denial: Option<&'static ErrorReply>,
}

/// How far the connection's last request has come.
#[derive(Default)]
pub(crate) struct ConnectionState {
    /// The version of the last request; `None` before the first.
    pub(crate) version: Cell<Option<Version>>,
    /// Whether the last request has come whole.
    pub(crate) is_request_complete: Cell<bool>,
    /// Once its response, a 101, has been flushed, the connection becomes this tunnel.
    pub(crate) tunnel: Cell<Option<Tunnel>>,
    is_flushed: Cell<bool>,
    /// Wakes the body that waits for the flush.
    flush_waker: Cell<Option<Waker>>,
}

impl ConnectionState {
    /// Something is being written to the client, or about to be.
    pub(crate) fn begin_write(&self) {
        self.is_flushed.set(false);
    }

    /// All that was written to the client has been flushed.
    pub(crate) fn end_write(&self) {
        self.is_flushed.set(true);
        if let Some(waker) = self.flush_waker.take() {
            waker.wake();
        }
    }

    /// Ready once all that was written to the client has been flushed.
    pub(super) fn poll_flushed(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_flushed.get() {
            return Poll::Ready(());
        }
        self.flush_waker.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

#[cfg(test)]
impl ConnectionState {
    pub(crate) fn for_tests(version: Option<Version>, is_request_complete: bool) -> Self {
        Self {
            version: Cell::new(version),
            is_request_complete: Cell::new(is_request_complete),
            ..Self::default()
        }
    }
}
