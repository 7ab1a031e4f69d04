//! One connection to the upstream, with one request at a time.
//!
//! hyper's connection is a task of its own. `hyper_util::client::legacy::Client` would do the same, and
//! pool as well, but it hides which connection a request goes out on: the credential could not be
//! announced to that connection's stream, and a response could not hold its connection back until it is
//! complete.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::{error::Error, pin::Pin, rc::Rc};

use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::{Request, Response, ext::on_informational};
use hyper_util::rt::TokioIo;
use tokio::task::{JoinHandle, spawn_local};

use super::authorizing_stream::{Announced, Announcement, AuthorizingStream, RequestPrefix};
use super::{Kind, connector::Stream};
use crate::flush::{FlushNoting, FlushState};
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS, MAX_INTERIM};

/// hyper's reason, or [`std::io::ErrorKind::TimedOut`].
pub(crate) type BodyError = Box<dyn Error + Send + Sync>;

/// A request's body on its way to the upstream.
pub(crate) type RequestBody = Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>;

/// The sending end of a connection. Dropping it closes the connection.
pub(crate) struct UpstreamConnection {
    sender: SendRequest<RequestBody>,
    /// Returns the stream when HTTP has ended on it, and what has been read behind the last response.
    task: JoinHandle<(Stream, Bytes)>,
    announcement: Announcement,
    interim: Arc<AtomicU32>,
    flush: FlushState,
}

impl UpstreamConnection {
    pub(super) async fn new(stream: Stream, prefix: &Rc<RequestPrefix>) -> hyper::Result<Self> {
        let (announcement, interim) = (Announcement::default(), Arc::default());
        let flush = FlushState::default();
        let stream = AuthorizingStream {
            stream,
            prefix: Rc::clone(prefix),
            announcement: Rc::clone(&announcement),
            interim: Arc::clone(&interim),
        };
        let state = flush.clone();
        let (sender, mut connection) = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_HEAD_BYTES)
            .allow_spaces_after_header_name_in_responses(true)
            .allow_obsolete_multiline_headers_in_responses(true)
            .handshake(TokioIo::new(FlushNoting { stream, state }))
            .await?;
        let task = spawn_local(async move {
            // An error is also that of the response or its body.
            let _ = (&mut connection).await;
            let parts = connection.into_parts();
            (parts.io.into_inner().stream.stream, parts.read_buf)
        });
        Ok(Self {
            sender,
            task,
            announcement,
            interim,
            flush,
        })
    }

    /// Sends a request and waits for the head of its response. An error contains the request if none of
    /// it was sent.
    pub(super) async fn send(
        &mut self,
        kind: Kind,
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.announcement.set(Some(Announced { kind, offset: 0 }));
        self.interim.store(0, Relaxed);
        let interim = Arc::clone(&self.interim);
        on_informational(&mut request, move |_| _ = interim.fetch_add(1, Relaxed));
        self.sender.try_send_request(request).await
    }

    /// Whether the last request had more than [`MAX_INTERIM`] interim responses.
    pub(super) fn exceeds_interim(&self) -> bool {
        self.interim.load(Relaxed) > MAX_INTERIM
    }

    /// Whether another request can be sent: not if the upstream has closed the connection or sent
    /// unsolicited bytes, and not while a part of a request that was responded to early is unsent.
    pub(super) fn is_idle(&self) -> bool {
        self.sender.is_ready() && self.flush.is_flushed()
    }

    /// After a 101, the stream and what has been read from it behind the head.
    ///
    /// `None` if the response came before the whole request was sent: then it is unknown which bytes
    /// belong to the tunnel.
    pub(crate) async fn into_upgraded(mut self) -> Option<(Stream, Bytes)> {
        if !self.flush.is_flushed() {
            return None;
        }
        (&mut self.task).await.ok()
    }
}

impl Drop for UpstreamConnection {
    fn drop(&mut self) {
        self.task.abort();
    }
}
