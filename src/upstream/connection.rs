//! One connection to the upstream, with one exchange at a time.
//!
//! hyper's connection is a task of its own. `hyper_util::client::legacy::Client` would do the same, and
//! pool as well, but it hides which connection a request goes out on: the credential could not be
//! announced to that connection's stream, and a response could not hold its connection back until it is
//! complete.

use std::error::Error;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::ext::on_informational;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::task::{JoinHandle, spawn_local};

use super::Kind;
use super::authorizing_stream::{Announced, Announcement, AuthorizingStream, Opening};
use super::connector::Stream;
use crate::flush::{FlushNoting, FlushState};
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS, MAX_INTERIM};

/// An error of a request's body.
pub type BodyError = Box<dyn Error + Send + Sync>;

/// A request's body on its way to the upstream.
pub type RequestBody = Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>;

/// The sending end of a connection. Dropping it closes the connection.
pub struct UpstreamConnection {
    sender: SendRequest<RequestBody>,
    /// Gives the stream back when HTTP has ended on it, and what has been read behind the last response.
    task: JoinHandle<(Stream, Bytes)>,
    announcement: Announcement,
    interim: Arc<AtomicU32>,
    flush: FlushState,
}

impl UpstreamConnection {
    /// A connection that has not been used.
    pub(super) async fn new(stream: Stream, opening: Rc<Opening>) -> hyper::Result<Self> {
        let announcement = Announcement::default();
        let interim = Arc::default();
        let flush = FlushState::default();
        let stream = AuthorizingStream {
            stream,
            opening,
            announcement: Rc::clone(&announcement),
            interim: Arc::clone(&interim),
        };
        let stream = FlushNoting {
            stream,
            state: flush.clone(),
        };
        let (sender, mut connection) = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_HEAD_BYTES)
            // To be repaired by a proxy, not rejected (RFC 9112, sections 5.1 and 5.2).
            .allow_spaces_after_header_name_in_responses(true)
            .allow_obsolete_multiline_headers_in_responses(true)
            .handshake(TokioIo::new(stream))
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

    /// Sends a request and waits for the head of its response.
    ///
    /// # Errors
    ///
    /// hyper's, and the request if none of it was sent.
    pub(super) async fn send(
        &mut self,
        kind: Kind,
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.announcement.set(Some(Announced::new(kind)));
        self.interim.store(0, Relaxed);
        let interim = Arc::clone(&self.interim);
        on_informational(&mut request, move |_| _ = interim.fetch_add(1, Relaxed));
        self.sender.try_send_request(request).await
    }

    /// Whether the last request had more than [`MAX_INTERIM`] interim responses.
    pub(super) fn exceeds_interim(&self) -> bool {
        self.interim.load(Relaxed) > MAX_INTERIM
    }

    /// Whether another request can be sent.
    ///
    /// Not if the upstream has closed it or sent what nobody asked for, and not while something of a
    /// request that was answered early is still to be sent.
    pub(super) fn is_idle(&self) -> bool {
        self.sender.is_ready() && self.flush.is_flushed()
    }

    /// After a 101, the stream and what has been read from it behind the head.
    ///
    /// `None` if the response came before the whole request was sent: then it isn't known what belongs
    /// to the tunnel.
    pub async fn into_upgraded(mut self) -> Option<(Stream, Bytes)> {
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
