//! Connections to the upstream, kept and used again.

use std::cell::RefCell;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::Response;
use tokio::time::{Instant, Sleep};

use crate::connector::{ConnectError, Connector};
use crate::link::{ExchangeError, Link};
use crate::outgoing::Outgoing;

/// How many idle connections are kept. More than this many at once are rare for one machine's users.
const MAX_IDLE: usize = 100;

/// How long a connection is kept without use. Servers close theirs after a minute or more.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Why there is no answer.
#[derive(Debug)]
pub enum UpstreamError {
    /// No connection, so nothing was sent.
    Connect(ConnectError),
    /// The exchange failed after at least a part of the request was sent.
    Exchange(ExchangeError),
}

/// An idle link and the time since when it is.
struct Idle {
    link: Link,
    since: Instant,
}

/// The idle links. All methods are for the one thread that the program has.
pub struct Upstream {
    connector: Connector,
    idle: RefCell<Vec<Idle>>,
    /// Of the task that watches over idle links, and whether it waits for the oldest to get too old.
    watcher: RefCell<(Waker, bool)>,
}

impl Upstream {
    /// With no connection yet.
    #[must_use]
    pub fn new(connector: Connector) -> Self {
        Self {
            connector,
            idle: RefCell::default(),
            watcher: RefCell::new((Waker::noop().clone(), false)),
        }
    }

    /// Does what the first connection would have to wait for.
    pub fn warm_up(&self) {
        self.connector.warm_up();
    }

    /// Sends `request` over an idle connection or a new one and waits for the head of its answer.
    ///
    /// An idle connection that the other side has closed is not used. A request of which anything was
    /// sent is never sent again: it is not idempotent (RFC 9110, section 9.2.2).
    ///
    /// # Errors
    ///
    /// See [`UpstreamError`].
    pub async fn send(&self, request: Outgoing) -> Result<(Link, Response<()>), UpstreamError> {
        let idle = std::future::poll_fn(|cx| Poll::Ready(self.take(cx))).await;
        let mut link = match idle {
            Some(link) => link,
            // Boxed, so that only those who connect have its memory.
            None => match Box::pin(self.connector.connect()).await {
                Ok(stream) => Link::new(stream),
                Err(error) => {
                    request.discard().await;
                    return Err(UpstreamError::Connect(error));
                }
            },
        };
        match link.send(request).await {
            Ok(response) => Ok((link, response)),
            Err(error) => Err(UpstreamError::Exchange(error)),
        }
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

    /// Keeps a link whose answer is whole, if it can be used again.
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
