//! A stream that joins small writes.

use std::task::{Context, Poll};
use std::{io, io::IoSlice, mem::MaybeUninit, pin::Pin};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The outcome of a stream's method.
pub(crate) type IoPoll<T> = Poll<io::Result<T>>;

/// The most bytes that are copied to be written at once: enough for a head with a small body, or an event with
/// its framing.
const MAX_JOINED: usize = 2048;

/// A stream that joins the slices of a small write: send(2) and a copy cost less than writev(2), which tokio calls
/// even for a single slice. Not for a stream to which the credential is written, since it would be copied.
pub(crate) struct JoiningStream<S>(pub(crate) S);

impl<S: AsyncRead + Unpin> AsyncRead for JoiningStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> IoPoll<()> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for JoiningStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> IoPoll<usize> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> IoPoll<usize> {
        let stream = Pin::new(&mut self.0);
        if let [all] = bufs {
            return stream.poll_write(cx, all);
        }
        if bufs.iter().map(|buf| buf.len()).sum::<usize>() > MAX_JOINED {
            return stream.poll_write_vectored(cx, bufs);
        }
        let mut space = [MaybeUninit::uninit(); MAX_JOINED];
        let mut joined = ReadBuf::uninit(&mut space);
        bufs.iter().for_each(|buf| joined.put_slice(buf));
        stream.poll_write(cx, joined.filled())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> IoPoll<()> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> IoPoll<()> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each write, and whether it came in slices.
    #[derive(Default)]
    struct Writes(Vec<(Vec<u8>, bool)>);

    impl AsyncWrite for Writes {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> IoPoll<usize> {
            self.0.push((buf.to_vec(), false));
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bufs: &[IoSlice<'_>],
        ) -> IoPoll<usize> {
            let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.to_vec()).collect();
            let count = all.len();
            self.0.push((all, true));
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> IoPoll<()> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> IoPoll<()> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn slices_are_joined_up_to_2048_bytes() {
        for (name, lengths, is_vectored) in [
            ("one, small", &[5][..], false),
            ("one, large", &[5000], false),
            ("few bytes", &[3, 0, 4, 2], false),
            ("2048 bytes", &[2000, 48], false),
            ("2049 bytes", &[2000, 49], true),
            ("large", &[5000, 1], true),
        ] {
            let parts = (b'a'..).zip(lengths);
            let parts: Vec<_> = parts.map(|(byte, &length)| vec![byte; length]).collect();
            let bufs: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
            let mut stream = JoiningStream(Writes::default());
            let mut cx = Context::from_waker(std::task::Waker::noop());
            let outcome = Pin::new(&mut stream).poll_write_vectored(&mut cx, &bufs);
            let all = parts.concat();
            assert!(
                matches!(outcome, Poll::Ready(Ok(count)) if count == all.len()),
                "{name}"
            );
            assert_eq!(stream.0.0, [(all, is_vectored)], "{name}");
        }
    }
}
