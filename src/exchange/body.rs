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

/// The outcome of polling a body.
type FramePoll<E> = Poll<Option<Result<Frame<Bytes>, E>>>;

/// How long a request's body may make no progress while the upstream accepts more: its connection
/// holds a slot meanwhile.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

/// A request's body on its way to the upstream.
pub(super) struct Upload {
    pub(super) body: Incoming,
    pub(super) state: Rc<ConnectionState>,
    pub(super) entry: Rc<AccessLogEntry>,
    /// Takes a copy.
    pub(super) tap: Tap,
    /// Runs while the upstream could accept more than the client has sent: hyper polls a body only then.
    pub(super) stalled: Option<Pin<Box<Sleep>>>,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> FramePoll<BodyError> {
        let this = &mut *self;
        let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx)? else {
            let new = || Box::pin(sleep(BODY_TIMEOUT));
            ready!(this.stalled.get_or_insert_with(new).as_mut().poll(cx));
            return Poll::Ready(Some(Err(io::Error::from(io::ErrorKind::TimedOut).into())));
        };
        this.stalled = None;
        let is_complete = frame.is_none() || this.body.is_end_stream();
        this.state.set_request_complete(is_complete);
        Poll::Ready(frame.map(|frame| Ok(pass(frame, &this.entry.received, &mut this.tap))))
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
    /// `None` once the body is complete.
    pub(super) connection: Option<(Rc<Upstream>, UpstreamConnection)>,
    pub(super) state: Rc<ConnectionState>,
    pub(super) entry: Rc<AccessLogEntry>,
    pub(super) tap: Tap,
    /// An error withheld until hyper has flushed the data before it: hyper drops what it has not flushed
    /// when a body fails.
    pub(super) deferred_error: Option<hyper::Error>,
}

impl Download {
    /// Pools the connection if the body is complete. hyper asks a complete body for nothing more.
    pub(super) fn release_at_end(&mut self, is_complete: bool) {
        if is_complete && let Some((upstream, connection)) = self.connection.take() {
            self.entry.error.take();
            self.state.begin_wait();
            upstream.release(connection);
        }
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> FramePoll<hyper::Error> {
        let this = &mut *self;
        if this.deferred_error.is_none() {
            match ready!(Pin::new(&mut this.body).poll_frame(cx)).transpose() {
                Ok(frame) => {
                    this.state.begin_write();
                    this.release_at_end(frame.is_none() || this.body.is_end_stream());
                    let pass = |frame| Ok(pass(frame, &this.entry.sent, &mut this.tap));
                    return Poll::Ready(frame.map(pass));
                }
                Err(error) => {
                    let message = format!("response truncated: {}", with_sources(&error));
                    this.entry.error.set(Some(message.into()));
                    this.deferred_error = Some(error);
                }
            }
        }
        ready!(this.state.poll_flushed(cx));
        Poll::Ready(this.deferred_error.take().map(Err))
    }

    fn is_end_stream(&self) -> bool {
        self.connection.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Counts and copies a part of a body. Trailer fields are left out, as RFC 9110, section 6.5.1, lets every
/// recipient do: nothing in the Responses API has any.
fn pass(frame: Frame<Bytes>, bytes: &Cell<usize>, tap: &mut Tap) -> Frame<Bytes> {
    let data = frame.into_data().unwrap_or_default();
    bytes.set(bytes.get() + data.len());
    tap.data(&data);
    Frame::data(data)
}
