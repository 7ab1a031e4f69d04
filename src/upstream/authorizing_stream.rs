//! Adds the credential's header line behind the request line, between hyper and the wire.
//!
//! hyper keeps the head that it last wrote in a buffer for the life of a connection and never wipes it. So the
//! credential is in no header: hyper writes a request without it, and this stream adds the line from the
//! key's page, as one slice of the same vectored write. TLS encrypts a copy of it in place.

use std::io::{Error, ErrorKind, IoSlice};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::{array::from_fn, cell::Cell, fmt::Display, pin::Pin, rc::Rc, sync::Arc};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::task::coop::poll_proceed;

use super::Kind;
use crate::{joining_stream::IoPoll, key::Credential, limits::MAX_INTERIM};

/// The most bytes per read: one less than hyper offers at first. It would offer more after a read that fills
/// its buffer, and keep as much memory for as long as the response streams.
const MAX_READ: u64 = 8191;

/// The additional cost of a read, of the 128 units that tokio lets a task use before others run. hyper may
/// read on for long while it has nothing to forward.
const READ_COST: u32 = 3;

/// The most slices in a write that contains a prefix. hyper's head and some of the body are fewer; the rest
/// goes into the next write.
const MAX_SLICES: usize = 8;

/// The beginning of every request: a request line, which hyper writes, and the credential's line.
pub(super) struct RequestPrefix {
    /// The request line for each [`Kind`] (RFC 9112, section 3), with its CR LF.
    lines: [String; 2],
    credential: Credential,
}

/// The state that a stream shares with the sender of its requests.
#[derive(Default)]
pub(super) struct StreamState {
    /// The kind of the request that is being written, and how many bytes of its prefix have been. Set before
    /// hyper is given a request; `None` while other bytes pass.
    pub(super) announced: Cell<Option<(Kind, usize)>>,
    /// Whether all that hyper has written has been flushed.
    pub(super) is_flushed: Cell<bool>,
    /// Whether a read has found nothing since the connection's task was woken, which it will be again. hyper tries up
    /// to three times per poll, and through TLS that costs.
    pub(super) is_drained: Cell<bool>,
    /// How many interim responses the last request has had. Atomic only because hyper's callbacks must be `Send`.
    pub(super) interim: Arc<AtomicU32>,
}

impl RequestPrefix {
    /// The prefix of requests with this target in origin form.
    pub(super) fn new(origin_form: impl Display, credential: Credential) -> Self {
        let line = |kind: Kind| format!("{} {origin_form} HTTP/1.1\r\n", kind.method());
        let lines = [Kind::Post, Kind::Handshake].map(line);
        Self { lines, credential }
    }
}

/// A stream to the upstream that adds the credential to each request.
pub(super) struct AuthorizingStream<S> {
    pub(super) stream: S,
    pub(super) prefix: Rc<RequestPrefix>,
    pub(super) state: Rc<StreamState>,
}

impl<S: AsyncRead + Unpin> AsyncRead for AuthorizingStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> IoPoll<()> {
        let this = self.get_mut();
        if this.state.interim.load(Relaxed) > MAX_INTERIM {
            return Poll::Ready(Err(Error::other("too many interim responses")));
        }
        if this.state.is_drained.get() {
            return Poll::Pending;
        }
        for _ in 0..READ_COST {
            ready!(poll_proceed(cx)).made_progress();
        }
        let mut limited = (&mut this.stream).take(MAX_READ);
        let outcome = Pin::new(&mut limited).poll_read(cx, buf);
        this.state.is_drained.set(outcome.is_pending());
        outcome
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AuthorizingStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> IoPoll<usize> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> IoPoll<usize> {
        let this = self.get_mut();
        this.state.is_flushed.set(false);
        let mut stream = Pin::new(&mut this.stream);
        while let Some((kind, written)) = this.state.announced.get() {
            let line = this.prefix.lines[kind as usize].as_bytes();
            let credential = this.prefix.credential.header_line();
            let line_left = line.get(written..).unwrap_or_default();
            let credential_left = &credential[written.saturating_sub(line.len())..];
            // hyper writes a head as one slice. The credential must follow nothing but the request line.
            let head = bufs.first().and_then(|head| head.strip_prefix(line_left));
            let unexpected = || Error::other("unexpected bytes in place of the request line");
            let front = [line_left, credential_left, head.ok_or_else(unexpected)?];
            let rest = bufs.iter().skip(1).map(|part| &**part);
            let mut parts = front.into_iter().chain(rest);
            let slices: [_; MAX_SLICES] = from_fn(|_| IoSlice::new(parts.next().unwrap_or(&[])));
            let count = stream.as_mut().poll_write_vectored(cx, &slices);
            let count = ready!(unless_closed(count))?;
            let (prefix, end) = (line.len() + credential.len(), written + count);
            let announced = (end < prefix).then_some((kind, end));
            this.state.announced.set(announced);
            // All that was written is hyper's, except for the credential.
            let in_credential = |position: usize| position.clamp(line.len(), prefix);
            let of_hyper = count - (in_credential(end) - in_credential(written));
            // Nothing to report yet if only a part of the credential was written.
            if of_hyper > 0 || count == 0 {
                return Poll::Ready(Ok(of_hyper));
            }
        }
        unless_closed(stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> IoPoll<()> {
        ready!(unless_closed(Pin::new(&mut self.stream).poll_flush(cx)))?;
        self.state.is_flushed.set(true);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> IoPoll<()> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// If an upstream responds early and closes, writes fail while its response waits to be read. So such a write
/// stays pending: reads yield first the response, then the end.
fn unless_closed<T>(outcome: IoPoll<T>) -> IoPoll<T> {
    let is_closed = |kind| matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
    match outcome {
        Poll::Ready(Err(error)) if is_closed(error.kind()) => Poll::Pending,
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// Each kind of request as hyper writes it, in two parts: the credential belongs between them.
    const REQUESTS: [(Kind, &str, &str); 2] = [
        (Kind::Post, "POST /v1 HTTP/1.1\r\n", "host: up\r\n\r\nbody"),
        (
            Kind::Handshake,
            "GET /v1 HTTP/1.1\r\n",
            "upgrade: x\r\n\r\n",
        ),
    ];

    fn prefix() -> Rc<RequestPrefix> {
        let mut input: &[u8] = b"sk-key\n";
        let read = |buffer: &mut [u8]| std::io::Read::read(&mut input, buffer);
        let credential = Credential::read(crate::key::KeyRule::OPENAI, read).unwrap();
        Rc::new(RequestPrefix::new("/v1", credential))
    }

    /// Accepts so many bytes per write, and is pending before each.
    #[derive(Default)]
    struct Wire {
        takes: VecDeque<usize>,
        taken: Vec<u8>,
        is_ready: bool,
    }

    impl AsyncWrite for Wire {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> IoPoll<usize> {
            unreachable!("all is written vectored")
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> IoPoll<usize> {
            self.is_ready = !self.is_ready;
            if self.is_ready {
                return Poll::Pending;
            }
            let all = bufs
                .iter()
                .flat_map(|buf| buf.to_vec())
                .collect::<Vec<u8>>();
            let count = self.takes.pop_front().unwrap_or(usize::MAX).min(all.len());
            self.taken.extend_from_slice(&all[..count]);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> IoPoll<()> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> IoPoll<()> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn reads_yield_to_other_tasks() {
        let mut stream = AuthorizingStream {
            stream: tokio::io::repeat(b'x'),
            prefix: prefix(),
            state: Rc::default(),
        };
        let mut count = 0;
        std::future::poll_fn(|cx| {
            let mut byte = [0];
            while Pin::new(&mut stream)
                .poll_read(cx, &mut ReadBuf::new(&mut byte))
                .is_ready()
            {
                count += 1;
            }
            Poll::Ready(())
        })
        .await;
        assert!((16..=64).contains(&count), "{count}");
    }

    #[test]
    fn drained_stream_is_not_read_again_before_the_next_poll() {
        let (near, mut far) = tokio::io::duplex(8);
        let state = Rc::new(StreamState::default());
        let mut stream = AuthorizingStream {
            stream: near,
            prefix: prefix(),
            state: Rc::clone(&state),
        };
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut read = |cx: &mut Context<'_>| {
            let mut byte = [0];
            let outcome = Pin::new(&mut stream).poll_read(cx, &mut ReadBuf::new(&mut byte));
            outcome.map(|outcome| outcome.map(|()| byte[0]).unwrap())
        };
        assert_eq!(read(&mut cx), Poll::Pending);
        assert!(Pin::new(&mut far).poll_write(&mut cx, b"xy").is_ready());
        assert_eq!(read(&mut cx), Poll::Pending);
        state.is_drained.set(false);
        assert_eq!(read(&mut cx), Poll::Ready(b'x'));
        assert_eq!(read(&mut cx), Poll::Ready(b'y'));
    }

    /// Writes all of `pieces` as hyper would: the rest again and again, until nothing is left.
    fn write(stream: &mut AuthorizingStream<Wire>, pieces: &[&[u8]]) -> std::io::Result<()> {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let mut pieces: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        let mut left = pieces.as_mut_slice();
        while left.iter().any(|piece| !piece.is_empty()) {
            match Pin::new(&mut *stream).poll_write_vectored(&mut cx, left) {
                Poll::Pending => {}
                Poll::Ready(count) => IoSlice::advance_slices(&mut left, count?),
            }
        }
        assert!(Pin::new(&mut *stream).poll_flush(&mut cx).is_ready());
        Ok(())
    }

    #[test]
    fn credential_follows_the_request_line_for_every_split() {
        let prefix = prefix();
        let check = |kind: Kind, wire: &[u8], pieces: &[&[u8]], takes: &[usize]| {
            let stream = Wire {
                takes: takes.iter().copied().collect(),
                ..Wire::default()
            };
            let mut stream = AuthorizingStream {
                stream,
                prefix: Rc::clone(&prefix),
                state: Rc::default(),
            };
            // Two requests on one stream, and other bytes between them.
            for _ in 0..2 {
                stream.state.announced.set(Some((kind, 0)));
                write(&mut stream, pieces).unwrap();
                write(&mut stream, &[b"more"]).unwrap();
            }
            let expected = [wire, b"more", wire, b"more"].concat();
            let name = format!("{pieces:?} {takes:?}");
            assert_eq!(
                stream.stream.taken.escape_ascii().to_string(),
                expected.escape_ascii().to_string(),
                "{name}"
            );
        };
        for (kind, line, rest) in REQUESTS {
            let request = [line, rest].concat().into_bytes();
            let wire = [line, "authorization: Bearer sk-key\r\n", rest].concat();
            let check = |pieces: &[&[u8]], takes: &[usize]| {
                check(kind, wire.as_bytes(), pieces, takes);
            };
            // hyper writes a head as one slice.
            for first in line.len()..=request.len() {
                let (front, rest) = request.split_at(first);
                for second in 0..=rest.len() {
                    let (middle, end) = rest.split_at(second);
                    check(&[front, middle, end], &[]);
                }
                // Every two short writes, in the middle of the key among them.
                for short in 1..=wire.len() {
                    check(&[front, rest], &[short, first.max(1)]);
                }
            }
            check(&[&request], &[1; 200]);
        }
    }

    #[test]
    fn credential_follows_nothing_but_the_request_line() {
        let prefix = prefix();
        for (kind, other) in [
            (Kind::Post, "POST /v2 HTTP/1.1\r\n\r\n"),
            (Kind::Post, "GET /v1 HTTP/1.1\r\n\r\n"),
            (Kind::Handshake, "POST /v1 HTTP/1.1\r\n\r\n"),
            (Kind::Post, "rest of a body"),
        ] {
            let mut stream = AuthorizingStream {
                stream: Wire::default(),
                prefix: Rc::clone(&prefix),
                state: Rc::default(),
            };
            stream.state.announced.set(Some((kind, 0)));
            write(&mut stream, &[other.as_bytes()]).expect_err(other);
            assert!(
                !stream
                    .stream
                    .taken
                    .windows(6)
                    .any(|window| window == b"sk-key"),
                "{other}"
            );
        }
    }
}
