//! Reads one request with hyper.
//!
//! hyper would answer it, too, but keeps 16 KiB of buffers for as long as that takes, which may be
//! hours. So it is given a service that never answers, and is let go of when the request is there.

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Pending, pending};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1::{Builder, Connection};
use hyper::service::Service;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use crate::socket::SharedSocket;
use crate::{MAX_HEAD_BYTES, MAX_HEADERS};

/// Where a request is put when its head has been read.
type Slot = Rc<Cell<Option<Request<Incoming>>>>;

/// Takes a request and never answers it.
struct Taker(Slot);

impl Service<Request<Incoming>> for Taker {
    type Response = Response<Incoming>;
    type Error = Infallible;
    type Future = Pending<Result<Self::Response, Self::Error>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        self.0.set(Some(request));
        pending()
    }
}

/// Reads a request and its body.
pub struct Reader {
    /// `None` once there is nothing more to read.
    connection: Option<Connection<TokioIo<SharedSocket>, Taker>>,
    slot: Slot,
}

impl Reader {
    /// Will read from `socket`.
    #[must_use]
    pub fn new(socket: SharedSocket) -> Self {
        let slot = Slot::default();
        let connection = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_HEAD_BYTES)
            .header_read_timeout(None)
            .auto_date_header(false)
            .half_close(true)
            .serve_connection(TokioIo::new(socket), Taker(Rc::clone(&slot)));
        Self {
            connection: Some(connection),
            slot,
        }
    }

    /// Gives the request as soon as its head has come; `None` at the end of the connection.
    ///
    /// # Errors
    ///
    /// What came is no request. The client has been told, as far as it can be.
    pub fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<hyper::Result<Option<Request<Incoming>>>> {
        let outcome = self.poll_on(cx);
        match (self.slot.take(), outcome) {
            (Some(request), _) => Poll::Ready(Ok(Some(request))),
            (None, outcome) => outcome.map_ok(|()| None),
        }
    }

    /// Reads on for the request's body, and sends a 100 (Continue) where it is due. An error is the
    /// body's, too.
    pub fn poll_on(&mut self, cx: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        let Some(connection) = &mut self.connection else {
            return Poll::Ready(Ok(()));
        };
        let outcome = Pin::new(connection).poll(cx);
        if outcome.is_ready() {
            self.connection = None;
        }
        outcome
    }

    /// What was read behind the request.
    #[must_use]
    pub fn into_rest(self) -> Bytes {
        let rest = self
            .connection
            .map(|connection| connection.into_parts().read_buf);
        // A copy, since the original holds on to the whole buffer.
        rest.map_or_else(Bytes::new, |rest| Bytes::copy_from_slice(&rest))
    }
}
