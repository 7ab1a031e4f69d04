//! A client's socket, whose incoming bytes are looked at on their way.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use hyper::body::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::framing::Scanner;

/// The socket and what is known of what came over it.
pub struct Socket {
    /// The connection.
    pub tcp: TcpStream,
    /// Follows what comes in.
    pub scanner: Scanner,
    /// What was read behind a request, for the next.
    pub rest: Bytes,
    /// The client has said that nothing more will come, or the connection is gone.
    pub has_ended: bool,
}

impl Socket {
    /// A connection over which nothing has come.
    #[must_use]
    pub fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            scanner: Scanner::default(),
            rest: Bytes::new(),
            has_ended: false,
        }
    }

    /// Waits until there is something to read: a request, or the end.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.rest.is_empty() {
            // Where this fails, so does reading.
            let _ = ready!(self.tcp.poll_read_ready(cx));
        }
        Poll::Ready(())
    }

    /// Waits until the client has left. That can't be told as long as it has sent more than its
    /// request.
    pub fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut byte = [MaybeUninit::uninit()];
        let mut byte = ReadBuf::uninit(&mut byte);
        if let Ok(1..) = ready!(self.tcp.poll_peek(cx, &mut byte)) {
            return Poll::Pending;
        }
        self.has_ended = true;
        Poll::Ready(())
    }

    /// Whether the connection has been reset (poll(2), which reports that unasked).
    #[allow(unsafe_code)]
    #[must_use]
    pub fn is_reset(&self) -> bool {
        let mut state = libc::pollfd {
            fd: self.tcp.as_raw_fd(),
            events: 0,
            revents: 0,
        };
        // SAFETY: one pollfd, valid for the call, which doesn't wait; `self.tcp` keeps it open.
        let count = unsafe { libc::poll(&mut state, 1, 0) };
        count > 0 && state.revents & (libc::POLLERR | libc::POLLHUP) != 0
    }
}

/// A handle on a socket, for hyper, which wants to own one.
pub struct SharedSocket(pub Rc<RefCell<Socket>>);

impl AsyncRead for SharedSocket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let socket = &mut *self.0.borrow_mut();
        if !socket.rest.is_empty() {
            let count = socket.rest.len().min(buf.remaining());
            buf.put_slice(&socket.rest.split_to(count));
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let outcome = Pin::new(&mut socket.tcp).poll_read(cx, buf);
        match &outcome {
            Poll::Ready(Ok(())) if buf.filled().len() > before => {
                socket.scanner.feed(&buf.filled()[before..]);
            }
            Poll::Ready(_) => socket.has_ended = true,
            Poll::Pending => {}
        }
        outcome
    }
}

impl AsyncWrite for SharedSocket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0.borrow_mut().tcp).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().tcp).poll_flush(cx)
    }

    /// Not yet: whoever has the socket decides when it is done.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
