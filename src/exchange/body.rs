//! Message bodies in transit: counted, copied for dumps, and tied to the connection they come from.

use std::task::{Context, Poll, ready};
use std::{cell::Cell, io, pin::Pin, rc::Rc, time::Duration};

use http_body_util::{Either, Full};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use tokio::time::{Sleep, sleep};

use super::{access_log::AccessLogEntry, connection_state::ConnectionState, dump::Tap};
use crate::log::with_sources;
use crate::upstream::{BodyError, Upstream, UpstreamConnection};

/// The body of a response to a client: one of our own, or the upstream's.
pub(crate) type ResponseBody = Either<Full<Bytes>, Download>;

/// How long a request's body may make no progress while the upstream accepts more: its connection
/// holds a slot meanwhile.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// A request's body on its way to the upstream.
///
/// Trailer fields are left out, as RFC 9110, section 6.5.1, lets every recipient do: nothing in the
/// Responses API has any.
pub(super) struct Upload {
    pub(super) body: Incoming,
    pub(super) state: Rc<ConnectionState>,
    pub(super) entry: Rc<AccessLogEntry>,
    /// Takes a copy.
    pub(super) tap: Option<Tap>,
    /// Runs while the upstream could accept more than the client has sent: hyper polls a body only then.
    pub(super) stalled: Option<Pin<Box<Sleep>>>,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) else {
            let new = || Box::pin(sleep(BODY_TIMEOUT));
            ready!(this.stalled.get_or_insert_with(new).as_mut().poll(cx));
            return Poll::Ready(Some(Err(io::Error::from(io::ErrorKind::TimedOut).into())));
        };
        this.stalled = None;
        let data = match frame {
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            end => {
                this.state.set_request_complete(end.is_none());
                return Poll::Ready(end.map(|end| end.map_err(Into::into)));
            }
        };
        count(&this.entry.received, &mut this.tap, &data);
        this.state.set_request_complete(this.body.is_end_stream());
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A response's body on its way to the client. Dropped before its end, it closes the upstream connection,
/// which is how the upstream learns that the client has left.
pub(crate) struct Download {
    pub(super) body: Incoming,
    pub(super) upstream: Rc<Upstream>,
    /// `None` once the body is complete.
    pub(super) connection: Option<UpstreamConnection>,
    pub(super) state: Rc<ConnectionState>,
    pub(super) entry: Rc<AccessLogEntry>,
    pub(super) tap: Option<Tap>,
    /// An error withheld until hyper has flushed the data before it: hyper drops what it has not flushed
    /// when a body fails.
    pub(super) deferred_error: Option<hyper::Error>,
}

impl Download {
    /// Pools the connection. hyper asks a complete body for nothing more.
    fn complete(&mut self) {
        self.entry.error.take();
        if let Some(connection) = self.connection.take() {
            self.upstream.release(connection);
        }
    }

    pub(super) fn complete_if_end_of_stream(&mut self) {
        if self.body.is_end_stream() {
            self.complete();
        }
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        if this.deferred_error.is_some() {
            ready!(this.state.poll_flushed(cx));
            return Poll::Ready(this.deferred_error.take().map(Err));
        }
        match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
            Some(Ok(frame)) => {
                let data = frame.into_data().unwrap_or_default();
                this.state.begin_write();
                count(&this.entry.sent, &mut this.tap, &data);
                this.complete_if_end_of_stream();
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(error)) => {
                let detail = with_sources(&error);
                let message = format!("response truncated: {detail}");
                this.entry.error.replace(Some(message.into()));
                this.deferred_error = Some(error);
                Pin::new(this).poll_frame(cx)
            }
            None => {
                this.complete();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.connection.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Accounts for a part of a body.
fn count(bytes: &Cell<usize>, tap: &mut Option<Tap>, data: &[u8]) {
    bytes.set(bytes.get() + data.len());
    if let Some(tap) = tap {
        tap.data(data);
    }
}
