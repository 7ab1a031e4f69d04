//! State shared by a client connection and its current request.

use std::cell::{Cell, RefCell};

use hyper::Version;
use hyper::body::{Body, Incoming};

use super::tunnel::Tunnel;
use crate::flush::FlushState;

/// The process at the other end of a client connection.
#[derive(Clone, Copy, Default)]
pub(crate) struct Peer {
    /// Its uid, if the kernel was queried.
    pub(crate) uid: Option<u32>,
    /// Whether its user may not be served.
    pub(crate) is_denied: bool,
    /// Whether that is because the user already has its share of the connections.
    pub(crate) exceeds_share: bool,
}

/// How far the connection's last request has come.
#[derive(Default)]
pub(crate) struct ConnectionState {
    version: Cell<Option<Version>>,
    is_request_complete: Cell<bool>,
    tunnel: RefCell<Option<Tunnel>>,
    /// Whether hyper has flushed what it was given to send to the client.
    pub(crate) flush: FlushState,
}

impl ConnectionState {
    /// The next request has come.
    pub(super) fn begin_request(&self, version: Version, body: &Incoming) {
        self.version.set(Some(version));
        self.is_request_complete.set(body.is_end_stream());
    }

    /// A part of the request's body has come, or its end.
    pub(super) fn set_request_complete(&self, is_complete: bool) {
        self.is_request_complete.set(is_complete);
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
        self.tunnel.replace(Some(tunnel));
    }

    pub(crate) fn take_tunnel(&self) -> Option<Tunnel> {
        self.tunnel.take()
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
