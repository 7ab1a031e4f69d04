//! A WebSocket after its handshake: bytes are copied both ways as they arrive, and never looked at.

use std::{cell::Cell, future::poll_fn, io, mem::MaybeUninit, pin::Pin, rc::Rc, time::Duration};

use hyper::body::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, split};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::access_log::AccessLogEntry;
use crate::shutdown::Shutdown;
use crate::upstream::{Io, Stream};

/// How much is read at once, in bytes. The space is on the stack: an idle tunnel holds no buffer.
const READ_SIZE: usize = 16 << 10;

/// How long a tunnel may be silent once one side has closed or shutdown has started. Otherwise there is no
/// limit: both ends send pings.
const MAX_SILENCE: Duration = Duration::from_secs(5);

/// The upstream's side of a tunnel whose client still waits for the response to its handshake.
pub(crate) struct Tunnel {
    /// The stream, and the bytes that the upstream sent right behind its response.
    pub(super) upstream: (Stream, Bytes),
    pub(super) entry: Rc<AccessLogEntry>,
}

impl Tunnel {
    /// Copies until both sides have closed, one has failed, or the tunnel is silent during shutdown. `early`
    /// was read from the client behind its handshake.
    pub(crate) async fn run(self, client: impl Io, early: Bytes, shutdown: &Shutdown) {
        let entry = self.entry;
        // Holds if the tunnel is dropped, which happens only when shutdown ends.
        let error = "still open when shutdown ended";
        entry.error.set(Some(error.into()));
        let activity = Activity::default();
        let (client, upstream) = (split(client), split(self.upstream.0));
        let up = copy(early, client.0, upstream.1, &entry.received, &activity);
        let early = self.upstream.1;
        let down = copy(early, upstream.0, client.1, &entry.sent, &activity);
        let both = async { tokio::try_join!(up, down) };
        let error = "one side closed and the other did not";
        let error = tokio::select! {
            biased;
            outcome = both => outcome.err().map(|error| error.to_string().into()),
            () = activity.falls_silent(shutdown) => (!shutdown.is_triggered()).then(|| error.into()),
        };
        entry.error.set(error);
    }
}

/// The activity of both directions of a tunnel.
#[derive(Default)]
struct Activity {
    /// When bytes were last written, or a side closed; `None` only before the tunnel begins.
    last: Cell<Option<Instant>>,
    /// One side has closed.
    closed: Notify,
}

impl Activity {
    /// Returns once a side has closed or shutdown has started, and [`MAX_SILENCE`] has passed without activity.
    async fn falls_silent(&self, shutdown: &Shutdown) {
        tokio::select! {
            () = self.closed.notified() => {}
            () = shutdown.wait() => {}
        }
        while let Some(last) = self.last.get().filter(|last| last.elapsed() < MAX_SILENCE) {
            sleep_until(last + MAX_SILENCE).await;
        }
    }
}

/// Copies `data`, then all that arrives from `from`. At its end, shuts `to` down: the other direction goes on,
/// since the peer may still be sending.
async fn copy(
    mut data: Bytes,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    count: &Cell<usize>,
    activity: &Activity,
) -> io::Result<()> {
    activity.last.set(Some(Instant::now()));
    loop {
        count.set(count.get() + data.len());
        while !data.is_empty() {
            if to.write_buf(&mut data).await? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            activity.last.set(Some(Instant::now()));
        }
        // It may be a part of the whole buffer that hyper has read into.
        drop(data);
        // TLS holds back what isn't flushed.
        to.flush().await?;
        data = read(&mut from).await?;
        if data.is_empty() {
            break;
        }
    }
    activity.last.set(Some(Instant::now()));
    activity.closed.notify_one();
    to.shutdown().await
}

/// Reads the bytes that have arrived; none at the end.
async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let outcome = poll_fn(|cx| {
        let mut space = [const { MaybeUninit::uninit() }; READ_SIZE];
        let mut buffer = ReadBuf::uninit(&mut space);
        let outcome = Pin::new(&mut *from).poll_read(cx, &mut buffer);
        outcome.map_ok(|()| Bytes::copy_from_slice(buffer.filled()))
    });
    match outcome.await {
        // Codex leaves without TLS's notice that it closes, as many do.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Bytes::new()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::{sleep, timeout};

    use super::*;

    /// Runs a tunnel while `meanwhile` uses its two outer ends. Gives how long the tunnel lasted, in
    /// milliseconds, or `None` if it was still open after a day.
    async fn lasts(
        meanwhile: impl AsyncFnOnce(&mut DuplexStream, &mut DuplexStream, &Shutdown),
    ) -> Option<u128> {
        let (mut client, inner_client) = duplex(100);
        let (mut upstream, inner_upstream) = duplex(100);
        let tunnel = Tunnel {
            upstream: (Box::new(inner_upstream), Bytes::new()),
            entry: Rc::new(AccessLogEntry::new(None)),
        };
        let shutdown = Shutdown::default();
        let begun = Instant::now();
        let running = async {
            tunnel.run(inner_client, Bytes::new(), &shutdown).await;
            begun.elapsed().as_millis()
        };
        let using = meanwhile(&mut client, &mut upstream, &shutdown);
        let day = Duration::from_secs(86_400);
        let (lasted, ()) = tokio::join!(timeout(day, running), using);
        lasted.ok()
    }

    /// Sends a byte through the tunnel after so many seconds.
    async fn send_after(seconds: u64, from: &mut DuplexStream, to: &mut DuplexStream) {
        sleep(Duration::from_secs(seconds)).await;
        from.write_all(b"x").await.unwrap();
        assert_eq!(to.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test(start_paused = true)]
    async fn silent_tunnel_stays_open() {
        assert_eq!(lasts(async |_, _, _| {}).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_ignores_a_close_is_dropped_after_5_s_of_silence() {
        let lasted = lasts(async |client, upstream, _| {
            send_after(60, client, upstream).await;
            client.shutdown().await.unwrap();
            assert_eq!(upstream.read(&mut [0]).await.unwrap(), 0);
            // The other direction goes on.
            send_after(4, upstream, client).await;
            send_after(4, upstream, client).await;
        });
        assert_eq!(lasted.await, Some(73_000));
    }

    #[tokio::test(start_paused = true)]
    async fn both_sides_closed_end_the_tunnel_at_once() {
        let lasted = lasts(async |client, upstream, _| {
            upstream.shutdown().await.unwrap();
            assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
            client.shutdown().await.unwrap();
        });
        assert_eq!(lasted.await, Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_closes_silent_tunnels_at_once_and_busy_ones_after_5_s() {
        let silent = lasts(async |client, upstream, shutdown| {
            send_after(1, client, upstream).await;
            sleep(Duration::from_secs(6)).await;
            shutdown.trigger();
        });
        assert_eq!(silent.await, Some(7_000));
        let busy = lasts(async |client, upstream, shutdown| {
            shutdown.trigger();
            send_after(4, client, upstream).await;
            send_after(4, upstream, client).await;
        });
        assert_eq!(busy.await, Some(13_000));
    }
}
