//! A client's stream that notes when all that was written to it has been flushed.

use std::task::{Context, Poll, ready};
use std::{io::IoSlice, pin::Pin};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{exchange::ConnectionState, joining_stream::IoPoll};

/// A stream and the state of its connection.
pub(super) struct FlushNoting<'a, S> {
    pub(super) stream: S,
    pub(super) state: &'a ConnectionState,
}

impl<S: AsyncRead + Unpin> AsyncRead for FlushNoting<'_, S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> IoPoll<()> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for FlushNoting<'_, S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> IoPoll<usize> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> IoPoll<usize> {
        self.state.begin_write();
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> IoPoll<()> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.state.end_write();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> IoPoll<()> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
