//! A wire for [`InjectingStream`] that takes bytes as reluctantly as it is told to.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use codex_responses_proxy::credential::Credential;
use codex_responses_proxy::injection::{Arm, InjectingStream, Injection};
use tokio::io::AsyncWrite;

/// What stands for a key.
pub(crate) const KEY: &[u8] = b"sk-on-the-wire";

/// An injection whose placeholder is the same in each run.
pub(crate) fn injection() -> Rc<Injection> {
    let mut key = KEY;
    let credential =
        Credential::read(|buffer| io::Read::read(&mut key, buffer)).expect("a good key");
    Rc::new(Injection::with_random(credential, b"0123456789abcdef"))
}

/// Takes at most so many bytes in each write as `limits` says in turn; 0 is "not now".
struct Wire<'a> {
    taken: Vec<u8>,
    limits: std::iter::Cycle<std::slice::Iter<'a, u8>>,
}

impl AsyncWrite for Wire<'_> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let limit = usize::from(*self.limits.next().expect("a cycle never ends"));
        if limit == 0 {
            return Poll::Pending;
        }
        let before = self.taken.len();
        let bytes = bufs.iter().flat_map(|buf| buf.iter().copied()).take(limit);
        self.taken.extend(bytes);
        Poll::Ready(Ok(self.taken.len() - before))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Writes each message as its own request, a message being the lists of slices of its writes, over a
/// wire with these `limits` (of which one must not be 0); gives what was on the wire.
pub(crate) fn send(
    injection: &Rc<Injection>,
    messages: &[Vec<Vec<&[u8]>>],
    limits: &[u8],
) -> Vec<u8> {
    let arm = Arm::default();
    let wire = Wire {
        taken: Vec::new(),
        limits: limits.iter().cycle(),
    };
    let mut stream = InjectingStream::new(wire, Rc::clone(injection), arm.clone());
    let mut cx = Context::from_waker(Waker::noop());
    for message in messages {
        arm.next_request();
        for write in message {
            let mut rest: Vec<IoSlice<'_>> =
                write.iter().map(|slice| IoSlice::new(slice)).collect();
            let mut rest = &mut rest[..];
            while rest.iter().any(|slice| !slice.is_empty()) {
                if let Poll::Ready(count) = Pin::new(&mut stream).poll_write_vectored(&mut cx, rest)
                {
                    IoSlice::advance_slices(&mut rest, count.expect("this wire never fails"));
                }
            }
        }
        while Pin::new(&mut stream).poll_flush(&mut cx).is_pending() {}
    }
    while Pin::new(&mut stream).poll_shutdown(&mut cx).is_pending() {}
    stream.get_ref().taken.clone()
}

/// What must be on the wire: in each message the first placeholder replaced, and nothing else.
pub(crate) fn expected(injection: &Injection, messages: &[Vec<Vec<&[u8]>>]) -> Vec<u8> {
    let placeholder = injection.placeholder();
    let placeholder = placeholder.as_bytes();
    let mut wire = Vec::new();
    for message in messages {
        let bytes = message.concat().concat();
        match bytes
            .windows(placeholder.len())
            .position(|window| window == placeholder)
        {
            None => wire.extend(bytes),
            Some(at) => {
                wire.extend_from_slice(&bytes[..at]);
                wire.extend_from_slice(b"Bearer ");
                wire.extend_from_slice(KEY);
                wire.extend_from_slice(&bytes[at + placeholder.len()..]);
            }
        }
    }
    wire
}
