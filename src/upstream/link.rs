//! One connection to the upstream, with one exchange at a time.

use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Waker};

use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use super::authorizing::{Authorizing, Opening, Progress};
use super::connector::Stream;
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS};

/// A request's body on its way up.
pub type RequestBody = Pin<Box<dyn Body<Data = Bytes, Error = hyper::Error>>>;

/// hyper's two ends of a client connection.
///
/// The connection is no task of its own: whoever holds the link drives it, so that an event goes from
/// socket to socket within one poll of one task, and letting go of the link is closing the connection.
pub struct Link {
    sender: SendRequest<RequestBody>,
    /// `None` once it has ended.
    connection: Option<Connection<TokioIo<Authorizing<Stream>>, RequestBody>>,
    progress: Rc<Progress>,
}

impl Link {
    /// A connection that has not been used.
    pub(super) async fn new(stream: Stream, opening: Rc<Opening>) -> hyper::Result<Self> {
        let progress: Rc<Progress> = Rc::default();
        let stream = Authorizing {
            stream,
            opening,
            progress: Rc::clone(&progress),
        };
        let (sender, connection) = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(stream))
            .await?;
        Ok(Self {
            sender,
            connection: Some(connection),
            progress,
        })
    }

    /// Sends and receives what can be. What the connection yields is then looked at with
    /// [`unwoken`]: nothing but this brings more of it, so `cx` is woken when there may be.
    pub fn drive(&mut self, cx: &mut Context<'_>) {
        let connection = self.connection.as_mut().map(Pin::new);
        // An error is also that of the answer or its body.
        if connection.is_some_and(|connection| connection.poll(cx).is_ready()) {
            self.connection = None;
        }
    }

    /// Sends a request and waits for the head of its answer.
    ///
    /// # Errors
    ///
    /// hyper's, and the request if none of it was sent.
    pub(super) async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.progress.at.set(Some(0));
        let mut answer = pin!(self.sender.try_send_request(request));
        poll_fn(|cx| {
            self.drive(cx);
            answer.as_mut().poll(&mut unwoken())
        })
        .await
    }

    /// Whether another request can be sent.
    ///
    /// Not if the upstream has closed it or sent what nobody asked for, and not while something of a
    /// request that was answered early is still to be sent.
    pub(super) fn is_idle(&mut self) -> bool {
        self.drive(&mut unwoken());
        self.connection.is_some() && self.sender.is_ready() && self.is_flushed()
    }

    /// Whether all that hyper has been given to send is sent.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        !self.progress.is_unflushed.get()
    }
}

/// A context for what is polled right behind [`Link::drive`].
#[must_use]
pub fn unwoken() -> Context<'static> {
    Context::from_waker(Waker::noop())
}
