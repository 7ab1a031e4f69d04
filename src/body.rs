//! Bodies on their way: counted, passed on as they come, and tied to what they came from.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use hyper::body::{Body, Bytes, Incoming};

use crate::batch::Source;
use crate::dump::Tap;
use crate::link::{ExchangeError, Link};
use crate::log::Record;
use crate::upstream::Upstream;

/// How far a request's body has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to come, or nobody asked yet.
    Underway,
    /// All of it has come and been taken.
    Complete,
    /// The client broke it off or sent something that is no body.
    Failed,
}

/// What is known of a request's body while the upstream connection owns it.
pub struct RequestState {
    progress: Cell<Progress>,
    bytes: Cell<u64>,
}

impl RequestState {
    /// The state of a body that nobody has asked for yet.
    pub fn of(body: &Incoming) -> Rc<Self> {
        let progress = if body.is_end_stream() {
            Progress::Complete
        } else {
            Progress::Underway
        };
        Rc::new(Self {
            progress: Cell::new(progress),
            bytes: Cell::new(0),
        })
    }

    /// How far the body has come.
    pub fn progress(&self) -> Progress {
        self.progress.get()
    }

    /// How many bytes of it have come.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }
}

/// A request's body on its way to the upstream.
///
/// Trailer fields are left out, as RFC 9110, section 6.5.1, lets every recipient do: nothing in the
/// Responses API has any.
pub struct RequestBody {
    client: Incoming,
    state: Rc<RequestState>,
    tap: Option<Tap>,
}

impl RequestBody {
    /// Wraps what comes from the client, with a copy to `tap`; `state`, which was made of it, tells how
    /// it fares.
    #[must_use]
    pub fn new(client: Incoming, state: Rc<RequestState>, tap: Option<Tap>) -> Self {
        Self { client, state, tap }
    }

    /// Takes what has come, as if it had been sent: if that is all, the client can go on to its next
    /// request.
    pub async fn discard(mut self) {
        poll_fn(|cx| {
            while let Poll::Ready(Some(Ok(_))) = self.poll_data(cx) {}
            Poll::Ready(())
        })
        .await;
    }

    /// How many bytes are still to come, if that is known.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        self.client.size_hint().exact()
    }
}

impl Source for RequestBody {
    type Error = hyper::Error;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<hyper::Result<Bytes>>> {
        let Some(frame) = ready!(Pin::new(&mut self.client).poll_frame(cx)) else {
            self.state.progress.set(Progress::Complete);
            return Poll::Ready(None);
        };
        let data = match frame {
            Ok(frame) => frame.into_data().unwrap_or_default(),
            Err(error) => {
                self.state.progress.set(Progress::Failed);
                return Poll::Ready(Some(Err(error)));
            }
        };
        self.state
            .bytes
            .set(self.state.bytes.get() + data.len() as u64);
        if let Some(tap) = &mut self.tap {
            tap.data(&data);
        }
        if self.is_over() {
            self.state.progress.set(Progress::Complete);
        }
        Poll::Ready(Some(Ok(data)))
    }

    fn is_over(&self) -> bool {
        self.client.is_end_stream()
    }
}

/// The body of a response to a client.
pub enum ResponseBody {
    /// Our own words; empty once they are taken.
    Own(Bytes),
    /// The upstream's.
    Relayed(Box<Relay>),
}

impl ResponseBody {
    /// Sends on what there is of a request that was answered before it was whole.
    ///
    /// # Errors
    ///
    /// The upstream broke its answer off, or the client its request.
    pub fn send_on(&mut self, cx: &mut Context<'_>) -> Result<(), ExchangeError> {
        match self {
            Self::Own(_) => Ok(()),
            Self::Relayed(relay) => relay.send_on(cx),
        }
    }

    /// How many bytes are still to come, if that is known.
    #[must_use]
    pub fn length(&self) -> Option<u64> {
        match self {
            Self::Own(words) => Some(words.len() as u64),
            Self::Relayed(relay) => match &relay.link {
                None => Some(0),
                Some(link) => link.remaining(),
            },
        }
    }
}

impl Source for ResponseBody {
    type Error = ExchangeError;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ExchangeError>>> {
        match self {
            Self::Own(words) if words.is_empty() => Poll::Ready(None),
            Self::Own(words) => Poll::Ready(Some(Ok(std::mem::take(words)))),
            Self::Relayed(relay) => relay.poll_data(cx),
        }
    }

    fn is_over(&self) -> bool {
        match self {
            Self::Own(words) => words.is_empty(),
            Self::Relayed(relay) => relay.link.is_none(),
        }
    }
}

/// An answer that streams from the upstream. Dropped before its end, it closes the upstream
/// connection, which is how the upstream learns that the client has left.
pub struct Relay {
    /// `None` once the answer is whole.
    link: Option<Link>,
    upstream: Rc<Upstream>,
    record: Record,
    tap: Option<Tap>,
}

impl Relay {
    /// The body of the answer whose head has come over `link`, with a copy to `tap`.
    #[must_use]
    pub fn new(link: Link, upstream: Rc<Upstream>, record: Record, tap: Option<Tap>) -> Self {
        let mut relay = Self {
            link: Some(link),
            upstream,
            record,
            tap,
        };
        relay.finish_if_over();
        relay
    }

    /// Once the answer is whole: logs it, and keeps the link.
    fn finish_if_over(&mut self) {
        if let Some(link) = self.link.take_if(|link| link.is_over()) {
            self.record.complete();
            self.tap = None;
            self.upstream.keep(link);
        }
    }

    fn send_on(&mut self, cx: &mut Context<'_>) -> Result<(), ExchangeError> {
        let sent = self.link.as_mut().map_or(Ok(()), |link| link.send_on(cx));
        sent.inspect_err(|error| self.record.broken_off(error))
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ExchangeError>>> {
        let Some(link) = &mut self.link else {
            return Poll::Ready(None);
        };
        let data = ready!(link.poll_data(cx));
        match &data {
            Some(Ok(data)) => {
                self.record.sent(data.len() as u64);
                if let Some(tap) = &mut self.tap {
                    tap.data(data);
                }
            }
            Some(Err(error)) => self.record.broken_off(error),
            None => {}
        }
        self.finish_if_over();
        Poll::Ready(data)
    }
}
