//! One connection to the upstream, with one request at a time.
//!
//! hyper's connection is a task of its own. `hyper_util::client::legacy::Client` would do the same, and
//! pool as well, but it hides which connection a request goes out on: the credential could not be
//! announced to that connection's stream, and a response could not hold its connection back until it is
//! complete.

use std::sync::{Arc, atomic::Ordering::Relaxed};
use std::{error::Error, future::poll_fn, pin::Pin, rc::Rc};

use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper::{Request, Response, ext::on_informational};
use hyper_util::rt::TokioIo;
use tokio::task::JoinSet;

use super::authorizing_stream::{AuthorizingStream, RequestPrefix, StreamState};
use super::{Kind, connector::Stream};
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS, MAX_INTERIM};

/// hyper's reason, or [`std::io::ErrorKind::TimedOut`].
pub(crate) type BodyError = Box<dyn Error + Send + Sync>;

/// A request's body on its way to the upstream.
pub(crate) type RequestBody = Pin<Box<dyn Body<Data = Bytes, Error = BodyError>>>;

/// The sending end of a connection. Dropping it closes the connection.
pub(crate) struct UpstreamConnection {
    http: SendRequest<RequestBody>,
    /// Returns the stream when HTTP has ended on it, and the bytes read behind the last response. A set, since
    /// dropping it aborts the task.
    task: JoinSet<(Stream, Bytes)>,
    state: Rc<StreamState>,
}

impl UpstreamConnection {
    pub(super) async fn new(stream: Stream, prefix: &Rc<RequestPrefix>) -> hyper::Result<Self> {
        let state = Rc::new(StreamState::default());
        let stream = AuthorizingStream {
            stream,
            prefix: Rc::clone(prefix),
            state: Rc::clone(&state),
        };
        let (http, mut connection) = Builder::new()
            .max_headers(MAX_HEADERS)
            .max_header_size(MAX_HEAD_BYTES)
            .max_buf_size(MAX_HEAD_BYTES)
            .allow_spaces_after_header_name_in_responses(true)
            .allow_obsolete_multiline_headers_in_responses(true)
            .handshake(TokioIo::new(stream))
            .await?;
        let mut task = JoinSet::new();
        let stream_state = Rc::clone(&state);
        task.spawn_local(async move {
            // An error is also that of the response or its body.
            let _ = poll_fn(|cx| {
                stream_state.is_drained.set(false);
                Pin::new(&mut connection).poll(cx)
            })
            .await;
            let parts = connection.into_parts();
            (parts.io.into_inner().stream, parts.read_buf)
        });
        Ok(Self { http, task, state })
    }

    /// Sends a request and waits for the head of its response. An error contains the request if none of
    /// it was sent.
    pub(super) async fn send(
        &mut self,
        kind: Kind,
        mut request: Request<RequestBody>,
    ) -> Result<Response<Incoming>, TrySendError<Request<RequestBody>>> {
        self.state.announced.set(Some((kind, 0)));
        self.state.interim.store(0, Relaxed);
        let interim = Arc::clone(&self.state.interim);
        on_informational(&mut request, move |_| _ = interim.fetch_add(1, Relaxed));
        self.http.try_send_request(request).await
    }

    /// Whether the last request had more than [`MAX_INTERIM`] interim responses.
    pub(super) fn exceeds_interim(&self) -> bool {
        self.state.interim.load(Relaxed) > MAX_INTERIM
    }

    /// Whether another request can be sent: not if the upstream has closed the connection or sent
    /// unsolicited bytes, and not while a part of a request that was responded to early is unsent.
    pub(super) fn is_idle(&self) -> bool {
        self.http.is_ready() && self.state.is_flushed.get()
    }

    /// After a 101, the stream and what has been read from it behind the head.
    ///
    /// `None` if the response came before the whole request was sent: then it is unknown which bytes
    /// belong to the tunnel.
    pub(crate) async fn into_upgraded(mut self) -> Option<(Stream, Bytes)> {
        if !self.state.is_flushed.get() {
            return None;
        }
        self.task.join_next().await?.ok()
    }
}
