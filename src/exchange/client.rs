//! What a connection and the exchanges over it tell each other.

use std::cell::{Cell, RefCell};
use std::task::{Context, Poll};

use hyper::Version;
use hyper::body::{Body, Incoming};

use super::tunnel::Tunnel;
use crate::upstream::Link;

/// Who is at the other end of a connection, and how far its last request has come.
#[derive(Default)]
pub struct Client {
    /// The uid of the process there, where it was asked for.
    pub uid: Option<u32>,
    /// Whether that user may not be served.
    pub is_refused: bool,
    /// The version of the last request, if there was one.
    pub version: Cell<Option<Version>>,
    /// Whether the body of the last request has come whole.
    pub has_sent_all: Cell<bool>,
    /// Counts how often hyper has had its turn on the connection.
    pub turn: Cell<u64>,
    /// What its answer comes over.
    pub link: RefCell<Option<Link>>,
    /// The upstream's side of the tunnel that the connection becomes when its last answer, a 101, has gone out.
    pub tunnel: RefCell<Option<Tunnel>>,
}

impl Client {
    /// Its next request has come.
    pub(super) fn asks(&self, version: Version, body: &Incoming) {
        self.version.set(Some(version));
        self.has_sent_all.set(body.is_end_stream());
    }

    /// Sends on what there is of a request whose answer has begun: while that waits for the client to
    /// read, nobody asks for more of it, and a client may read only when it has sent all.
    pub fn send_on(&self, cx: &mut Context<'_>) {
        if let Some(link) = &mut *self.link.borrow_mut()
            && !(self.has_sent_all.get() && link.is_flushed())
        {
            let _ = link.poll(cx, |_| Poll::<()>::Pending);
        }
    }
}
