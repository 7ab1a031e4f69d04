//! What goes out: headers and a body come in, and a request with the credential goes up; its answer leaves,
//! with the [`UpstreamConnection`] that it comes over.

mod authorizing_stream;
mod connection;
mod connector;
pub mod outbound_proxy;
mod pool;
pub mod target;
mod tunnel;

use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;

use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_LENGTH, HeaderMap, TRANSFER_ENCODING, UPGRADE};
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::task::yield_now;

use self::authorizing_stream::Opening;
pub use self::connection::{BodyError, RequestBody, UpstreamConnection};
pub use self::connector::{Connector, Stream, ca_file};
use self::pool::Pool;
use self::target::Target;
use crate::failure::Failure;
use crate::key::Credential;

/// The kinds of requests that are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request with a body, whose response has one.
    Post,
    /// A WebSocket handshake (RFC 6455, section 4.1).
    Handshake,
}

impl Kind {
    /// The method that stands in the request line.
    pub(crate) fn method(self) -> Method {
        match self {
            Self::Post => Method::POST,
            Self::Handshake => Method::GET,
        }
    }
}

/// The upstream, and the links to it that are kept.
pub struct Upstream {
    connector: Connector,
    opening: Rc<Opening>,
    /// Where it is.
    pub target: Target,
    pool: Pool,
}

impl Upstream {
    /// With no connection yet.
    #[must_use]
    pub fn new(target: Target, connector: Connector, credential: Credential) -> Self {
        Self {
            connector,
            opening: Rc::new(Opening::new(&target.origin_form.to_string(), credential)),
            target,
            pool: Pool::default(),
        }
    }

    /// Does what the first connection would have to wait for, and then drops links that get too old.
    /// Never ends.
    pub async fn maintain(&self) {
        self.connector.seed_rng();
        self.pool.evict_expired().await;
    }

    /// Sends a request over an idle link or a new one and waits for the head of its answer.
    ///
    /// A request of which anything was sent is never sent again: it is not idempotent (RFC 9110,
    /// section 9.2.2).
    ///
    /// # Errors
    ///
    /// There is no answer, or none that can be passed on.
    pub async fn send(
        &self,
        kind: Kind,
        headers: HeaderMap,
        body: RequestBody,
    ) -> Result<(UpstreamConnection, Response<Incoming>), Failure> {
        let mut request = Request::new(body);
        *request.method_mut() = kind.method();
        *request.uri_mut() = self.target.origin_form.clone();
        *request.headers_mut() = headers;
        loop {
            let kept = self.acquire();
            let is_kept = kept.is_some();
            let mut link = match kept {
                Some(link) => link,
                // Boxed, so that only those who connect have its memory.
                None => match Box::pin(self.connector.connect()).await {
                    Ok(stream) => UpstreamConnection::new(stream, Rc::clone(&self.opening)).await?,
                    Err(failure) => {
                        discard(request.body_mut()).await;
                        return Err(failure);
                    }
                },
            };
            let outcome = link.send(kind, request).await;
            if link.exceeds_interim() {
                let message = "the upstream sent more than 32 interim responses (protocol)";
                return Err(Failure::no_answer(message));
            }
            match outcome {
                Ok(answer) => return Ok((link, checked(kind, answer)?)),
                Err(mut error) => match error.take_message() {
                    // The link has ended since it was looked at.
                    Some(unsent) if is_kept => request = unsent,
                    _ => return Err(error.into_error().into()),
                },
            }
        }
    }

    /// The idle link used last that is still open.
    fn acquire(&self) -> Option<UpstreamConnection> {
        std::iter::from_fn(|| self.pool.acquire()).find_map(|link| link.is_idle().then_some(link))
    }

    /// Keeps a link whose answer is whole, if it can be used again.
    pub fn release(&self, link: UpstreamConnection) {
        if link.is_idle() {
            self.pool.release(link);
        }
    }
}

/// Takes what has come of a request's body that goes nowhere: if that is all, its connection can go on.
pub async fn discard(mut body: impl Body + Unpin) {
    // hyper reads what it was asked for when it has its turn, which is in between.
    for _ in 0..2 {
        poll_fn(|cx| {
            while let Poll::Ready(Some(Ok(_))) = Pin::new(&mut body).poll_frame(cx) {}
            Poll::Ready(())
        })
        .await;
        yield_now().await;
    }
}

/// Whether a message comes in chunks; `None` if it has another transfer coding, or more than one.
#[must_use]
pub fn is_chunked(headers: &HeaderMap) -> Option<bool> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => Some(false),
        (Some(coding), None) => coding
            .as_bytes()
            .eq_ignore_ascii_case(b"chunked")
            .then_some(true),
        _ => None,
    }
}

/// Whether a message's only `Upgrade` is a WebSocket. The name is compared without case (RFC 6455,
/// section 4.2.1).
#[must_use]
pub fn is_websocket(headers: &HeaderMap) -> bool {
    let mut protocols = headers.get_all(UPGRADE).iter();
    let first = protocols.next().map(|value| value.as_bytes());
    first.is_some_and(|name| name.eq_ignore_ascii_case(b"websocket")) && protocols.next().is_none()
}

/// Looks at how an answer is framed: that header ends here, so what it says must have been done.
fn checked(kind: Kind, mut answer: Response<Incoming>) -> Result<Response<Incoming>, Failure> {
    let is_expected = kind == Kind::Handshake && answer.version() == Version::HTTP_11;
    let message = match is_chunked(answer.headers()) {
        _ if answer.status() == StatusCode::SWITCHING_PROTOCOLS => {
            if is_expected && is_websocket(answer.headers()) {
                return Ok(answer);
            }
            "the upstream switched to a protocol that was not requested (protocol)"
        }
        Some(false) => return Ok(answer),
        Some(true) if answer.version() == Version::HTTP_11 => {
            // Chunks go before a length (RFC 9112, section 6.3).
            answer.headers_mut().remove(CONTENT_LENGTH);
            return Ok(answer);
        }
        _ => "the upstream's answer has a transfer coding other than chunked (protocol)",
    };
    Err(Failure::no_answer(message))
}
