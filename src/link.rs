//! One connection to the upstream, with one exchange at a time.
//!
//! It is no task of its own: whoever holds the link drives it, so that an event goes from socket to
//! socket within one poll of one task, and letting go of the link is closing the connection.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use hyper::Response;
use hyper::body::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::answer::{self, Decoder, Malformed};
use crate::connector::UpstreamStream;
use crate::outgoing::Outgoing;

/// How much is read at once, in bytes: as much as a TLS record can hold (RFC 8446, section 5.1). It is
/// on the stack, so a stream that waits has no buffer here.
const READ_BYTES: usize = 16 << 10;

/// Why an exchange failed after a connection was there.
#[derive(Debug)]
pub enum ExchangeError {
    /// The client broke its request off, or sent something that is no body.
    Request(hyper::Error),
    /// The connection failed.
    Io(io::Error),
    /// The connection ended before the answer began.
    Unanswered,
    /// What came is no HTTP.
    Malformed(Malformed),
}

impl fmt::Display for ExchangeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Request(_) => f.write_str("the request's body broke off or is malformed"),
            Self::Io(_) => f.write_str("the connection failed"),
            Self::Unanswered => f.write_str("the connection was closed before an answer came"),
            Self::Malformed(malformed) => malformed.fmt(f),
        }
    }
}

impl std::error::Error for ExchangeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Request(error) => Some(error),
            Self::Io(error) => Some(error),
            Self::Unanswered | Self::Malformed(_) => None,
        }
    }
}

impl From<Malformed> for ExchangeError {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

/// A connection and the exchange that it is in.
pub struct Link {
    stream: UpstreamStream,
    /// The request, until all of it is sent.
    outgoing: Option<Outgoing>,
    /// Something has been written since the last flush.
    needs_flush: bool,
    /// The other side takes nothing more.
    is_cut_off: bool,
    /// The front of a head; then the data that came together with the end of the head.
    unread: Bytes,
    body: Decoder,
    /// The other side means to serve another request, and has sent nothing that belongs to none.
    is_persistent: bool,
}

impl Link {
    /// A connection that has not been used.
    #[must_use]
    pub fn new(stream: UpstreamStream) -> Self {
        Self {
            stream,
            outgoing: None,
            needs_flush: false,
            is_cut_off: false,
            unread: Bytes::new(),
            body: Decoder::default(),
            is_persistent: true,
        }
    }

    /// Whether another request can be sent. If so, `cx` is woken when that changes.
    ///
    /// A link whose request was not sent whole is not idle: the upstream would wait for the rest for
    /// ever. Nor is one on which anything came that no request was sent for.
    pub fn is_idle(&mut self, cx: &mut Context<'_>) -> bool {
        let is_over = self.outgoing.is_none() && self.is_over();
        let mut byte = [MaybeUninit::uninit()];
        is_over
            && self.is_persistent
            && Pin::new(&mut self.stream)
                .poll_read(cx, &mut ReadBuf::uninit(&mut byte))
                .is_pending()
    }

    /// Sends a request and waits for the head of its answer. The body is sent on by whoever reads the
    /// answer, if the head comes before the request is whole.
    ///
    /// # Errors
    ///
    /// See [`ExchangeError`]. At least a part of the request may have been sent.
    pub async fn send(&mut self, request: Outgoing) -> Result<Response<()>, ExchangeError> {
        self.outgoing = Some(request);
        std::future::poll_fn(|cx| self.poll_head(cx)).await
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<()>, ExchangeError>> {
        self.send_on(cx)?;
        loop {
            let (unread, body) = (&mut self.unread, &mut self.body);
            let taken = ready!(poll_read(&mut self.stream, cx, |bytes| take_head(
                unread, body, bytes
            )));
            if let Some(taken) = taken.map_err(ExchangeError::Io)?? {
                self.unread = taken.data;
                self.is_persistent = taken.is_persistent;
                return Poll::Ready(Ok(taken.response));
            }
        }
    }

    /// Gives the next data of the answer's body, as soon as there is any.
    ///
    /// # Errors
    ///
    /// The answer breaks off, or is none any more.
    pub fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, ExchangeError>>> {
        if let Err(error) = self.send_on(cx) {
            return Poll::Ready(Some(Err(error)));
        }
        if !self.unread.is_empty() {
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.unread))));
        }
        while !self.body.is_complete() {
            let body = &mut self.body;
            let decoded = ready!(poll_read(&mut self.stream, cx, |bytes| {
                if bytes.is_empty() {
                    body.end()?;
                }
                decode(body, bytes)
            }));
            match decoded
                .map_err(ExchangeError::Io)
                .and_then(|decoded| Ok(decoded?))
            {
                Err(error) => return Poll::Ready(Some(Err(error))),
                Ok((data, is_all)) => {
                    self.is_persistent &= is_all;
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
            }
        }
        Poll::Ready(None)
    }

    /// Whether the answer's body has come whole.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.unread.is_empty() && self.body.is_complete()
    }

    /// How much of the answer's body is still to come, in bytes, if that is known.
    #[must_use]
    pub fn remaining(&self) -> Option<u64> {
        Some(self.body.remaining()? + self.unread.len() as u64)
    }

    /// Sends as much of the request as there is and the upstream takes.
    ///
    /// # Errors
    ///
    /// The client broke it off, or the connection failed.
    pub fn send_on(&mut self, cx: &mut Context<'_>) -> Result<(), ExchangeError> {
        let Some(outgoing) = &mut self.outgoing else {
            return Ok(());
        };
        if self.is_cut_off {
            return Ok(());
        }
        let stream = &mut self.stream;
        let outcome = loop {
            let written = outgoing.poll_write(cx, stream);
            match written.map_err(ExchangeError::Request)? {
                Poll::Pending => break Ok(false),
                Poll::Ready(Ok(true)) => self.needs_flush = true,
                Poll::Ready(Ok(false)) if !self.needs_flush => break Ok(outgoing.body_is_over()),
                Poll::Ready(Ok(false)) => match Pin::new(&mut *stream).poll_flush(cx) {
                    Poll::Pending => break Ok(false),
                    Poll::Ready(Ok(())) => self.needs_flush = false,
                    Poll::Ready(Err(error)) => break Err(error),
                },
                Poll::Ready(Err(error)) => break Err(error),
            }
        };
        match outcome {
            Ok(is_sent) => {
                if is_sent {
                    self.outgoing = None;
                }
                Ok(())
            }
            // An upstream that answers early and closes makes writing fail while its answer waits to
            // be read. Reading gives first the answer and then the end.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                self.is_cut_off = true;
                Ok(())
            }
            Err(error) => Err(ExchangeError::Io(error)),
        }
    }
}

/// Reads once and calls `take` with what came, which is nothing at the end.
fn poll_read<T>(
    stream: &mut UpstreamStream,
    cx: &mut Context<'_>,
    take: impl FnOnce(&[u8]) -> T,
) -> Poll<io::Result<T>> {
    let mut bytes = [MaybeUninit::uninit(); READ_BYTES];
    let mut bytes = ReadBuf::uninit(&mut bytes);
    ready!(Pin::new(stream).poll_read(cx, &mut bytes))?;
    Poll::Ready(Ok(take(bytes.filled())))
}

/// A head and what came with its end.
struct Taken {
    response: Response<()>,
    is_persistent: bool,
    data: Bytes,
}

/// Puts `bytes` behind those that are `unread` and takes the head of the actual answer from them, if
/// it is all there; `body` is then where the body is.
fn take_head(
    unread: &mut Bytes,
    body: &mut Decoder,
    bytes: &[u8],
) -> Result<Option<Taken>, ExchangeError> {
    if bytes.is_empty() {
        return Err(ExchangeError::Unanswered);
    }
    let joined;
    let mut bytes = if unread.is_empty() {
        bytes
    } else {
        joined = [unread, bytes].concat();
        &joined
    };
    while let Some(head) = answer::parse(bytes)? {
        bytes = &bytes[head.length..];
        if !head.is_interim() {
            *body = head.body;
            let (data, is_all) = decode(body, bytes)?;
            return Ok(Some(Taken {
                response: head.response,
                is_persistent: head.is_persistent && is_all,
                data,
            }));
        }
    }
    *unread = Bytes::copy_from_slice(bytes);
    Ok(None)
}

/// The data in `bytes`, and whether all of them belong to the body.
fn decode(body: &mut Decoder, bytes: &[u8]) -> Result<(Bytes, bool), Malformed> {
    let mut data = Vec::with_capacity(bytes.len());
    let count = body.decode(bytes, &mut data)?;
    Ok((data.into(), count == bytes.len()))
}
