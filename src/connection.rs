//! One client connection, from its acceptance to its last byte.

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::exchange::{Client, Proxy};
use crate::framing::Scanner;
use crate::stop::Stop;
use crate::{MAX_HEAD_BYTES, MAX_HEADERS};

/// How long a head may take to come, and how long a connection may be idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long after the end has begun a connection that has sent nothing yet, or half a head, may still
/// send a request: it was made in the belief that it would be served.
const LAST_REQUEST_GRACE: Duration = Duration::from_millis(500);

/// How long a client that is still sending when its answer is complete may pause, and how much it may
/// send, before the connection is closed. Closing at once would reset it, and the client could lose
/// the answer (RFC 9112, section 9.6).
const LINGER_PAUSE: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 256 << 20;

/// How often a client is looked at whose body the upstream doesn't take: as long as nothing is read
/// from it, nothing tells that it has reset the connection.
const STUCK_CHECK: Duration = Duration::from_secs(1);

/// Serves one client until either side is done.
pub async fn serve(stream: TcpStream, proxy: Rc<Proxy>, stop: Rc<Stop>) {
    // Without it, events wait for the acknowledgement of those before them (Nagle's algorithm).
    let _ = stream.set_nodelay(true);
    let client = Rc::new(proxy.admit(&stream).await);
    let stream = Rc::new(RefCell::new(ClientStream {
        tcp: stream,
        scanner: Scanner::default(),
        client: Rc::clone(&client),
        ended: false,
    }));
    let service = service_fn(|request| {
        let (proxy, client) = (Rc::clone(&proxy), Rc::clone(&client));
        // Boxed, because hyper keeps its place in memory while the answer streams.
        Box::pin(async move { Ok::<_, Infallible>(proxy.answer(&client, request).await) })
    });
    let mut connection = Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_BYTES)
        .max_buf_size(MAX_HEAD_BYTES)
        .auto_date_header(false)
        // Leaving is watched for below: hyper would keep a buffer for what it might read.
        .half_close(true)
        .serve_connection(TokioIo::new(SharedStream(Rc::clone(&stream))), service);

    let ending = async {
        stop.begun().await;
        if client.is_new() || client.in_head.get() {
            sleep(LAST_REQUEST_GRACE).await;
        }
    };
    let mut ending = pin!(ending);
    let mut asked_to_end = false;
    let mut stuck_check: Option<Pin<Box<Sleep>>> = None;
    let is_clean = std::future::poll_fn(|cx| {
        if let Poll::Ready(outcome) = Pin::new(&mut connection).poll(cx) {
            return Poll::Ready(outcome.is_ok());
        }
        if !asked_to_end && ending.as_mut().poll(cx).is_ready() {
            asked_to_end = true;
            if client.in_head.get() && !client.is_busy() {
                return Poll::Ready(true);
            }
            Pin::new(&mut connection).graceful_shutdown();
            if let Poll::Ready(outcome) = Pin::new(&mut connection).poll(cx) {
                return Poll::Ready(outcome.is_ok());
            }
        }
        if !client.is_busy() {
            stuck_check = None;
            return Poll::Pending;
        }
        if !client.may_be_sending() {
            stuck_check = None;
            return stream.borrow_mut().poll_left(cx).map(|()| false);
        }
        let check = stuck_check.get_or_insert_with(|| Box::pin(sleep(STUCK_CHECK)));
        while check.as_mut().poll(cx).is_ready() {
            if stream.borrow().is_gone() {
                return Poll::Ready(false);
            }
            check.as_mut().reset(Instant::now() + STUCK_CHECK);
        }
        Poll::Pending
    })
    .await;
    drop(connection);
    let Some(stream) = Rc::into_inner(stream).map(RefCell::into_inner) else {
        return;
    };
    if !is_clean && client.ends_by_close.get() {
        let _ = stream.tcp.set_zero_linger();
    } else if !stream.ended && (!is_clean || client.may_be_sending()) {
        // Where it isn't clean there was a head that is none: nobody knows what follows it. Boxed, so
        // that only those who linger have its buffer.
        Box::pin(linger(stream.tcp)).await;
    }
}

/// Says that nothing more will come, then takes what the client still sends, within bounds.
async fn linger(mut stream: TcpStream) {
    if stream.shutdown().await.is_err() {
        return;
    }
    let mut scratch = [0; 16 << 10];
    let mut left = LINGER_BYTES;
    while let Ok(Ok(count)) = tokio::time::timeout(LINGER_PAUSE, stream.read(&mut scratch)).await {
        left = left.saturating_sub(count);
        if count == 0 || left == 0 {
            return;
        }
    }
}

/// A client's socket, whose incoming bytes are looked at on their way.
struct ClientStream {
    tcp: TcpStream,
    scanner: Scanner,
    client: Rc<Client>,
    /// The client has said that nothing more will come, or the connection is gone.
    ended: bool,
}

impl ClientStream {
    /// Waits until the client has left. That can't be told as long as it has sent more than its
    /// request.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut byte = [MaybeUninit::uninit()];
        let mut byte = ReadBuf::uninit(&mut byte);
        if let Ok(1..) = ready!(self.tcp.poll_peek(cx, &mut byte)) {
            return Poll::Pending;
        }
        self.ended = true;
        Poll::Ready(())
    }

    /// Whether the connection has been reset (poll(2), which reports that unasked).
    #[allow(unsafe_code)]
    fn is_gone(&self) -> bool {
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

/// What hyper holds of a [`ClientStream`].
struct SharedStream(Rc<RefCell<ClientStream>>);

impl AsyncRead for SharedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self.get_mut().0.borrow_mut();
        let before = buf.filled().len();
        let outcome = Pin::new(&mut this.tcp).poll_read(cx, buf);
        match &outcome {
            Poll::Ready(Ok(())) if buf.filled().len() > before => {
                this.scanner.feed(&buf.filled()[before..]);
                this.client.findings.set(this.scanner.findings());
                this.client.in_head.set(this.scanner.is_in_head());
                this.client.in_body.set(this.scanner.is_in_body());
            }
            Poll::Ready(_) => this.ended = true,
            Poll::Pending => {}
        }
        outcome
    }
}

impl AsyncWrite for SharedStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0.borrow_mut().tcp).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0.borrow_mut().tcp).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().tcp).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.borrow_mut().tcp).poll_shutdown(cx)
    }
}
