//! Bodies on their way: counted, passed on as they come, and tied to what they came from.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use http_body_util::Full;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};

use crate::dump::Tap;
use crate::log::Record;
use crate::upstream::{Link, Upstream};

/// How far a request's body has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// There is more to come, or nobody asked yet.
    Underway,
    /// All of it has been handed to the upstream connection.
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
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        let frame = ready!(poll_data(&mut this.client, cx));
        match &frame {
            Some(Ok(frame)) => {
                this.state.bytes.set(this.state.bytes.get() + length(frame));
                copy(frame, &mut this.tap);
                if this.client.is_end_stream() {
                    this.state.progress.set(Progress::Complete);
                }
            }
            Some(Err(_)) => this.state.progress.set(Progress::Failed),
            None => this.state.progress.set(Progress::Complete),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.client.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.client.size_hint()
    }
}

/// The next frame with data in it.
fn poll_data(
    body: &mut Incoming,
    cx: &mut Context<'_>,
) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
    loop {
        match ready!(Pin::new(&mut *body).poll_frame(cx)) {
            Some(Ok(frame)) if !frame.is_data() => {}
            other => return Poll::Ready(other),
        }
    }
}

fn copy(frame: &Frame<Bytes>, tap: &mut Option<Tap>) {
    if let (Some(tap), Some(data)) = (tap, frame.data_ref()) {
        tap.data(data);
    }
}

fn length(frame: &Frame<Bytes>) -> u64 {
    frame.data_ref().map_or(0, |data| data.len() as u64)
}

/// The body of an answer to a client.
pub enum ResponseBody {
    /// Our own words.
    Own(Full<Bytes>),
    /// The upstream's.
    Relayed(Box<Relay>),
}

impl From<Bytes> for ResponseBody {
    fn from(bytes: Bytes) -> Self {
        Self::Own(Full::new(bytes))
    }
}

/// An answer that streams from the upstream. Dropped before its end, it closes the upstream
/// connection, which is how the upstream learns that the client has left.
pub struct Relay {
    answer: Incoming,
    link: Option<Link>,
    upstream: Rc<Upstream>,
    record: Record,
    tap: Option<Tap>,
}

impl Relay {
    /// Ties the answer's body to the link it comes over, with a copy to `tap`.
    #[must_use]
    pub fn new(
        answer: Incoming,
        link: Link,
        upstream: Rc<Upstream>,
        record: Record,
        tap: Option<Tap>,
    ) -> Self {
        let mut relay = Self {
            answer,
            link: Some(link),
            upstream,
            record,
            tap,
        };
        if relay.answer.is_end_stream() {
            relay.finish();
        }
        relay
    }

    /// The answer is whole: log it, and keep the link.
    fn finish(&mut self) {
        self.record.complete();
        self.tap = None;
        if let Some(link) = self.link.take() {
            self.upstream.keep(link);
        }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let relay = match self.get_mut() {
            Self::Own(body) => {
                return Pin::new(body)
                    .poll_frame(cx)
                    .map_err(|never| match never {});
            }
            Self::Relayed(relay) => &mut **relay,
        };
        let answer = &mut relay.answer;
        let frame = ready!(match &mut relay.link {
            Some(link) => link.drive(cx, |cx| poll_data(answer, cx)),
            None => poll_data(answer, cx),
        });
        match &frame {
            Some(Ok(frame)) => {
                relay.record.sent(length(frame));
                copy(frame, &mut relay.tap);
                if relay.answer.is_end_stream() {
                    relay.finish();
                }
            }
            Some(Err(error)) => relay.record.broken_off(error),
            None => relay.finish(),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(body) => body.is_end_stream(),
            Self::Relayed(relay) => relay.answer.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(body) => body.size_hint(),
            Self::Relayed(relay) => relay.answer.size_hint(),
        }
    }
}
