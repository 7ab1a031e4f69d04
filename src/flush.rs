//! A stream that notes whether all that was written to it has been flushed.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::task::{Context, Poll, Waker, ready};
use std::{pin::Pin, rc::Rc};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Whether a stream has been flushed since something was last written, or was about to be. Clones share
/// the state.
#[derive(Clone, Default)]
pub(crate) struct FlushState(Rc<Shared>);

#[derive(Default)]
struct Shared {
    is_flushed: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl FlushState {
    /// Something is about to be written.
    pub(crate) fn clear(&self) {
        self.0.is_flushed.set(false);
    }

    pub(crate) fn is_flushed(&self) -> bool {
        self.0.is_flushed.get()
    }

    /// Ready once the stream has been flushed.
    pub(crate) fn poll_flushed(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_flushed() {
            return Poll::Ready(());
        }
        self.0.waker.replace(Some(cx.waker().clone()));
        Poll::Pending
    }

    fn set(&self) {
        self.0.is_flushed.set(true);
        if let Some(waker) = self.0.waker.take() {
            waker.wake();
        }
    }
}

/// A stream and its state.
pub(crate) struct FlushNoting<S> {
    pub(crate) stream: S,
    pub(crate) state: FlushState,
}

impl<S: AsyncRead + Unpin> AsyncRead for FlushNoting<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FlushNoting<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.state.clear();
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.state.set();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
