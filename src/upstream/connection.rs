//! One connection to the upstream, with one exchange at a time.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use super::Kind;
use super::authorizing_stream::{Announced, Announcement, AuthorizingStream, Opening};
use super::connector::Stream;
use crate::flush::{FlushNoting, FlushState};
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS};

/// A request's body on its way up.
pub type RequestBody = Pin<Box<dyn Body<Data = Bytes, Error = hyper::Error>>>;

/// hyper's two ends of a client connection.
///
/// The connection is no task of its own: whoever holds the link drives it, so that an event goes from
/// socket to socket within one poll of one task, and letting go of the link is closing the connection.
pub struct UpstreamConnection {
    sender: SendRequest<RequestBody>,
    connection: Connection<TokioIo<FlushNoting<AuthorizingStream<Stream>>>, RequestBody>,
    has_ended: bool,
    announcement: Announcement,
    flush: FlushState,
    waker: Arc<QuietWaker>,
}

impl UpstreamConnection {
    /// A connection that has not been used.
    pub(super) async fn new(stream: Stream, opening: Rc<Opening>) -> hyper::Result<Self> {
        let announcement = Announcement::default();
        let flush = FlushState::default();
        let stream = AuthorizingStream {
            stream,
            opening,
            announcement: Rc::clone(&announcement),
        };
        let stream = FlushNoting {
            stream,
            state: flush.clone(),
        };
        let (sender, connection) = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(stream))
            .await?;
        Ok(Self {
            sender,
            connection,
            has_ended: false,
            announcement,
            flush,
            waker: Arc::default(),
        })
    }

    /// Sends and receives what can be, and polls what the connection yields: an answer or its body.
    ///
    /// The two wake each other whenever one has done something for the other. Both are looked at here in
    /// turn until neither has, so such a wake-up is no reason to poll the whole task once more.
    pub fn poll<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        *self.waker.task() = None;
        let outcome = loop {
            self.waker.is_woken.store(false, Relaxed);
            self.drive();
            let outcome = poll(&mut Context::from_waker(Waker::noop()));
            if outcome.is_ready() || !self.waker.is_woken.load(Relaxed) {
                break outcome;
            }
        };
        *self.waker.task() = Some(cx.waker().clone());
        outcome
    }

    fn drive(&mut self) {
        let waker = Waker::from(Arc::clone(&self.waker));
        let mut cx = Context::from_waker(&waker);
        if !self.has_ended {
            // An error is also that of the answer or its body.
            self.has_ended = Pin::new(&mut self.connection).poll(&mut cx).is_ready();
        }
    }

    /// Sends a request and waits for the head of its answer.
    ///
    /// # Errors
    ///
    /// hyper's, and the request if none of it was sent.
    pub(super) async fn send(
        &mut self,
        kind: Kind,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.announcement.set(Some(Announced::new(kind)));
        let mut answer = pin!(self.sender.try_send_request(request));
        poll_fn(|cx| self.poll(cx, |cx| answer.as_mut().poll(cx))).await
    }

    /// Whether another request can be sent.
    ///
    /// Not if the upstream has closed it or sent what nobody asked for, and not while something of a
    /// request that was answered early is still to be sent.
    pub(super) fn is_idle(&mut self) -> bool {
        // Nobody is to be woken for it while it is kept, so no task that is over is held on to.
        *self.waker.task() = None;
        self.drive();
        !self.has_ended && self.sender.is_ready() && self.is_flushed()
    }

    /// After a 101, the stream and what has been read from it behind the head.
    ///
    /// `None` if the response came before the whole request was sent, or hyper has not let go of the
    /// connection: then it isn't known what belongs to the tunnel.
    pub fn into_upgraded(self) -> Option<(Stream, Bytes)> {
        let is_upgraded = self.has_ended && self.is_flushed();
        let parts = self.connection.into_parts();
        is_upgraded.then(|| (parts.io.into_inner().stream.stream, parts.read_buf))
    }

    /// Whether all that hyper has been given to send is sent.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.flush.is_flushed()
    }
}

/// Wakes the task that holds a link, but not while that looks after the link.
#[derive(Default)]
struct QuietWaker {
    /// `None` meanwhile.
    task: Mutex<Option<Waker>>,
    is_woken: AtomicBool,
}

impl QuietWaker {
    fn task(&self) -> MutexGuard<'_, Option<Waker>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for QuietWaker {
    fn wake(self: Arc<Self>) {
        match &*self.task() {
            Some(task) => task.wake_by_ref(),
            None => self.is_woken.store(true, Relaxed),
        }
    }
}
