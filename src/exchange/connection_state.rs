//! State shared by a client connection and its current request.

use std::cell::Cell;
use std::task::{Context, Poll, Waker};

use hyper::Version;
use tokio::time::Instant;

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
    version: Cell<Option<Version>>,
    is_request_complete: Cell<bool>,
    waiting_since: Cell<Option<Instant>>,
    tunnel: Cell<Option<Tunnel>>,
    is_flushed: Cell<bool>,
    /// Wakes the body that waits for the flush.
    flush_waker: Cell<Option<Waker>>,
}

impl ConnectionState {
    /// The next request has come, or at least its head.
    pub(super) fn begin_request(&self, version: Version, is_complete: bool) {
        self.version.set(Some(version));
        self.waiting_since.set(None);
        self.set_request_complete(is_complete);
    }

    /// A part of the request's body has come, or its end.
    pub(super) fn set_request_complete(&self, is_complete: bool) {
        self.is_request_complete.set(is_complete);
    }

    /// The connection waits for the head of the next request.
    pub(crate) fn begin_wait(&self) {
        self.waiting_since.set(Some(Instant::now()));
    }

    /// Since when the connection waits for that; `None` while a request is in progress.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        self.waiting_since.get()
    }

    /// The version of the last request; `None` before the first.
    pub(crate) fn version(&self) -> Option<Version> {
        self.version.get()
    }

    /// Whether the last request has come whole.
    pub(crate) fn is_request_complete(&self) -> bool {
        self.is_request_complete.get()
    }

    /// Once its response, a 101, has been flushed, the connection becomes this tunnel.
    pub(super) fn set_tunnel(&self, tunnel: Tunnel) {
        self.tunnel.set(Some(tunnel));
    }

    pub(crate) fn take_tunnel(&self) -> Option<Tunnel> {
        self.tunnel.take()
    }

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
