//! Connections to the upstream, kept and used again.

use std::cell::RefCell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use hyper::Request;
use hyper::Response;
use hyper::body::Incoming;
use hyper::client::conn::http1::{Builder, Connection, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::time::{Instant, Sleep};

use crate::body::RequestBody;
use crate::connector::{ConnectError, Connector, HyperIo};
use crate::injection::{Arm, InjectingStream, Injection};
use crate::quiet::Quiet;
use crate::{MAX_HEAD_BYTES, MAX_HEADERS};

/// How many idle connections are kept. More than this many at once are rare for one machine's users.
const MAX_IDLE: usize = 100;

/// How long a connection is kept without use. Servers close theirs after a minute or more.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Why there is no answer.
#[derive(Debug)]
pub enum UpstreamError {
    /// No connection, so nothing was sent.
    Connect(ConnectError),
    /// The connection failed, or what came was no HTTP, after at least a part was sent.
    Exchange(hyper::Error),
}

/// One connection and what drives it.
///
/// The connection is no task of its own: whoever holds the link polls it, so that an event goes from
/// socket to socket within one task, and letting go of the link is closing the connection.
pub struct Link {
    /// `None` once it has ended.
    connection: Option<LinkConnection>,
    quiet: Quiet,
    sender: SendRequest<RequestBody>,
    arm: Arm,
}

impl Link {
    /// Lets the connection read and write, then calls `next`, which waits for something that comes
    /// over it. How the connection ends, `next` is told too, which is where it is dealt with.
    pub fn drive<T>(
        &mut self,
        cx: &Context<'_>,
        mut next: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let connection = &mut self.connection;
        self.quiet.poll(cx, |cx| {
            let _ = poll_connection(connection, cx);
            next(cx)
        })
    }

    /// Whether another request can be sent. If so, `cx` is woken when that changes.
    fn is_idle(&mut self, cx: &mut Context<'_>) -> bool {
        poll_connection(&mut self.connection, cx).is_pending() && self.sender.is_ready()
    }

    /// Sends a request and waits for the head of its answer.
    ///
    /// The error carries the request if none of it was sent.
    async fn send(
        &mut self,
        request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, (hyper::Error, Option<Request<RequestBody>>)> {
        self.arm.next_request();
        let mut answer = pin!(self.sender.try_send_request(request));
        std::future::poll_fn(|cx| self.drive(cx, |cx| answer.as_mut().poll(cx)))
            .await
            .map_err(|mut error| {
                let unsent = error.take_message();
                (error.into_error(), unsent)
            })
    }
}

/// What hyper runs a connection with.
type LinkConnection = Pin<Box<Connection<HyperIo, RequestBody>>>;

/// `Ready` means that it has ended.
fn poll_connection(connection: &mut Option<LinkConnection>, cx: &mut Context<'_>) -> Poll<()> {
    if let Some(running) = connection {
        let _ = ready!(running.as_mut().poll(cx));
        *connection = None;
    }
    Poll::Ready(())
}

/// An idle link and the time since when it is.
struct Idle {
    link: Link,
    since: Instant,
}

/// The idle links. All methods are for the one thread that the program has.
pub struct Upstream {
    connector: Connector,
    injection: Rc<Injection>,
    idle: RefCell<Vec<Idle>>,
    /// Of the task that watches over idle links, and whether it waits for the oldest to get too old.
    watcher: RefCell<(Waker, bool)>,
}

impl Upstream {
    /// With no connection yet.
    #[must_use]
    pub fn new(connector: Connector, injection: Injection) -> Self {
        Self {
            connector,
            injection: Rc::new(injection),
            idle: RefCell::default(),
            watcher: RefCell::new((Waker::noop().clone(), false)),
        }
    }

    /// Does what the first connection would have to wait for.
    pub fn warm_up(&self) {
        self.connector.warm_up();
    }

    /// What stands for the credential in a request.
    #[must_use]
    pub fn injection(&self) -> &Injection {
        &self.injection
    }

    /// Sends `request` over an idle connection or a new one.
    ///
    /// An idle connection may turn out to have been closed by the other side; as long as nothing was
    /// sent, the request goes over the next one. A request of which anything was sent is never sent
    /// again: it is not idempotent (RFC 9110, section 9.2.2).
    ///
    /// # Errors
    ///
    /// See [`UpstreamError`].
    pub async fn send(
        &self,
        mut request: Request<RequestBody>,
    ) -> Result<(Link, Response<Incoming>), UpstreamError> {
        loop {
            let reused = std::future::poll_fn(|cx| Poll::Ready(self.take(cx))).await;
            let fresh = reused.is_none();
            let mut link = match reused {
                Some(link) => link,
                None => self.connect().await?,
            };
            match link.send(request).await {
                Ok(response) => return Ok((link, response)),
                Err((_, Some(unsent))) if !fresh => request = unsent,
                Err((error, _)) => return Err(UpstreamError::Exchange(error)),
            }
        }
    }

    async fn connect(&self) -> Result<Link, UpstreamError> {
        let stream = self
            .connector
            .connect()
            .await
            .map_err(UpstreamError::Connect)?;
        let arm = Arm::default();
        let io = TokioIo::new(InjectingStream::new(
            stream,
            Rc::clone(&self.injection),
            arm.clone(),
        ));
        let (sender, connection) = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .handshake(io)
            .await
            .map_err(UpstreamError::Exchange)?;
        Ok(Link {
            connection: Some(Box::pin(connection)),
            quiet: Quiet::default(),
            sender,
            arm,
        })
    }

    /// The idle link used last that is still open.
    fn take(&self, cx: &mut Context<'_>) -> Option<Link> {
        loop {
            let mut idle = self.idle.borrow_mut().pop()?;
            if idle.link.is_idle(cx) {
                return Some(idle.link);
            }
        }
    }

    /// Keeps a link whose answer is whole, if it can be used again. One whose request was not sent
    /// whole is not idle: it would wait for the rest for ever (hyper issue 4176), so it is closed.
    pub fn keep(&self, mut link: Link) {
        let (watcher, waits) = &mut *self.watcher.borrow_mut();
        let usable = link.is_idle(&mut Context::from_waker(watcher));
        let mut idle = self.idle.borrow_mut();
        if usable && idle.len() < MAX_IDLE {
            idle.push(Idle {
                link,
                since: Instant::now(),
            });
            if !*waits {
                *waits = true;
                watcher.wake_by_ref();
            }
        }
    }

    /// Closes idle links that the other side has closed, at once, or that are too old. Never ends.
    pub async fn watch(&self) {
        let mut timer: Pin<Box<Sleep>> = Box::pin(tokio::time::sleep(Duration::ZERO));
        std::future::poll_fn(|cx| {
            let mut idle = self.idle.borrow_mut();
            idle.retain_mut(|idle| idle.link.is_idle(cx));
            // The links are in the order in which they became idle: the first is the oldest.
            let mut waits = false;
            while let Some(oldest) = idle.first() {
                timer.as_mut().reset(oldest.since + IDLE_TIMEOUT);
                waits = timer.as_mut().poll(cx).is_pending();
                if waits {
                    break;
                }
                idle.remove(0);
            }
            *self.watcher.borrow_mut() = (cx.waker().clone(), waits);
            Poll::<()>::Pending
        })
        .await;
    }
}
