//! Bodies on their way: counted, passed on as they come, and tied to what they came from.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use http_body_util::{Either, Full};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};

use super::client::Client;
use super::dump::Tap;
use super::record::Record;
use crate::log::with_sources;
use crate::upstream::Upstream;

/// The body of an answer to a client: our own words, or the upstream's.
pub type AnswerBody = Either<Full<Bytes>, Download>;

/// A request's body on its way up.
///
/// Trailer fields are left out, as RFC 9110, section 6.5.1, lets every recipient do: nothing in the
/// Responses API has any.
pub(super) struct Upload {
    pub(super) body: Incoming,
    /// Whose it is, who is told how it fares.
    pub(super) client: Rc<Client>,
    /// How many bytes of it have come.
    pub(super) received: Rc<Cell<usize>>,
    /// Takes a copy.
    pub(super) tap: Option<Tap>,
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<hyper::Result<Frame<Bytes>>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let data = match frame {
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            end => {
                self.client.has_sent_all.set(end.is_none());
                return Poll::Ready(end);
            }
        };
        self.received.set(self.received.get() + data.len());
        self.client.has_sent_all.set(self.body.is_end_stream());
        if let Some(tap) = &mut self.tap {
            tap.data(&data);
        }
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body on its way down. Dropped before its end, it closes the upstream connection, which is
/// how the upstream learns that the client has left.
pub struct Download {
    body: Incoming,
    upstream: Rc<Upstream>,
    client: Rc<Client>,
    record: Record,
    /// Why it breaks off, until what came before has gone out, and in which turn of hyper's it was asked
    /// for last.
    broken: Option<(hyper::Error, u64)>,
}

impl Download {
    /// The body of an answer that comes over the client's link.
    pub(super) fn new(
        body: Incoming,
        upstream: Rc<Upstream>,
        client: Rc<Client>,
        record: Record,
    ) -> Self {
        let mut download = Self {
            body,
            upstream,
            client,
            record,
            broken: None,
        };
        download.finish_at_end(false);
        download
    }

    /// Once the body is whole: logs it, and keeps the link. hyper asks for nothing more after that.
    fn finish_at_end(&mut self, is_over: bool) {
        if (is_over || self.body.is_end_stream())
            && let Some(link) = self.client.link.take()
        {
            self.record.error = None;
            self.upstream.keep(link);
        }
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        self.client.link.take();
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
        if let Some((error, asked)) = this.broken.take() {
            // hyper drops what it has not flushed when a body fails. A body that has nothing to give is
            // asked again in the same turn if all has been flushed meanwhile, and only then.
            let turn = this.client.turn.get();
            if turn == asked {
                return Poll::Ready(Some(Err(error)));
            }
            this.broken = Some((error, turn));
            return Poll::Pending;
        }
        let frame = match &mut *this.client.link.borrow_mut() {
            None => return Poll::Ready(None),
            Some(link) => ready!(link.poll(cx, |cx| Pin::new(&mut this.body).poll_frame(cx))),
        };
        match frame {
            Some(Ok(frame)) => {
                let data = frame.into_data().unwrap_or_default();
                this.record.data(&data);
                this.finish_at_end(false);
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Some(Err(error)) => {
                let detail = with_sources(&error);
                this.record.error = Some(format!("answer broken off: {detail}"));
                this.broken = Some((error, this.client.turn.get()));
                Poll::Pending
            }
            None => {
                this.finish_at_end(true);
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.client.link.borrow().is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
