//! One client connection, from its acceptance to its last byte.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::body::{Progress, RequestState};
use crate::exchange::{Client, Proxy};
use crate::reader::Reader;
use crate::socket::{SharedSocket, Socket};
use crate::stop::Stop;
use crate::writer::{Manner, WriteError, Writer};

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
pub async fn serve(tcp: TcpStream, proxy: Rc<Proxy>, stop: Rc<Stop>) {
    // Without it, events wait for the acknowledgement of those before them (Nagle's algorithm).
    let _ = tcp.set_nodelay(true);
    let client = proxy.admit(&tcp).await;
    let mut connection = Connection {
        socket: Rc::new(RefCell::new(Socket::new(tcp))),
        reader: None,
        request: None,
        stuck_check: None,
    };
    let end = connection.run(client, &proxy, &stop).await;
    let is_sending = connection.may_be_sending();
    drop(connection.reader);
    let Some(socket) = Rc::into_inner(connection.socket).map(RefCell::into_inner) else {
        return;
    };
    match end {
        End::Reset => {
            let _ = socket.tcp.set_zero_linger();
        }
        // Boxed, so that only those who linger have its buffer.
        End::Close if is_sending && !socket.has_ended => Box::pin(linger(socket.tcp)).await,
        End::Malformed if !socket.has_ended => Box::pin(linger(socket.tcp)).await,
        End::Close | End::Malformed => {}
    }
}

/// How a connection is to be ended.
enum End {
    /// There is nothing more to do.
    Close,
    /// What came was no request, and nobody knows what follows it.
    Malformed,
    /// So that the client can't take a part of an answer for the whole.
    Reset,
}

struct Connection {
    socket: Rc<RefCell<Socket>>,
    /// While there is something of a request to be read.
    reader: Option<Reader>,
    /// The last request.
    request: Option<Rc<RequestState>>,
    stuck_check: Option<Pin<Box<Sleep>>>,
}

impl Connection {
    async fn run(&mut self, client: Client, proxy: &Proxy, stop: &Stop) -> End {
        let mut ending = pin!(stop.begun());
        let mut head_timeout = pin!(sleep(HEAD_TIMEOUT));
        loop {
            let request = match self.next(ending.as_mut(), head_timeout.as_mut()).await {
                Ok(Some(request)) => request,
                Ok(None) => return End::Close,
                Err(_) => return End::Malformed,
            };
            let state = RequestState::of(request.body());
            self.request = Some(Rc::clone(&state));
            let findings = self.socket.borrow().scanner.findings();
            let mut manner = Manner::of(&request);
            // Boxed, since it needs much memory, and its answer may take hours.
            let answer = Box::pin(proxy.answer(client, findings, request, state));
            let Some(response) = self.while_here(answer).await else {
                return End::Close;
            };
            // Where a request that is answered ends is not followed, so the next can't be found.
            let is_whole = self.request.as_ref().is_some_and(is_complete);
            manner.closes |= !is_whole || findings.must_close() || stop.has_begun();
            let mut writer = Writer::new(response, manner);
            let ends_by_close = writer.ends_by_close();
            let socket = Rc::clone(&self.socket);
            let writing = poll_fn(|cx| writer.poll(cx, &mut socket.borrow_mut().tcp));
            match self.while_here(writing).await {
                Some(Ok(())) => {}
                // The connection may still be good; it is its end that tells.
                None | Some(Err(WriteError::Upstream)) if ends_by_close => return End::Reset,
                None | Some(Err(WriteError::Upstream)) => return End::Close,
                Some(Err(WriteError::Client)) => {
                    self.socket.borrow_mut().has_ended = true;
                    return End::Close;
                }
            }
            if manner.closes {
                return End::Close;
            }
        }
    }

    /// The next request; `None` if there is none any more. Its body may be still to come.
    ///
    /// Nothing is set up before there is something to read, so an idle connection has no buffer.
    async fn next(
        &mut self,
        mut ending: Pin<&mut impl Future<Output = ()>>,
        mut head_timeout: Pin<&mut Sleep>,
    ) -> hyper::Result<Option<Request<Incoming>>> {
        let deadline = Instant::now() + HEAD_TIMEOUT;
        let mut grace: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|cx| {
            if let Poll::Ready(request) = self.poll_request(cx) {
                return Poll::Ready(request);
            }
            // Moving the timer for each request would be dearer than to look again when it is over.
            while head_timeout.as_mut().poll(cx).is_ready() {
                if Instant::now() >= deadline {
                    return Poll::Ready(Ok(None));
                }
                head_timeout.as_mut().reset(deadline);
            }
            if grace.is_none() {
                ready!(ending.as_mut().poll(cx));
                if self.request.is_some() && !self.socket.borrow().scanner.is_in_head() {
                    return Poll::Ready(Ok(None));
                }
            }
            let grace = grace.get_or_insert_with(|| Box::pin(sleep(LAST_REQUEST_GRACE)));
            grace.as_mut().poll(cx).map(|()| Ok(None))
        })
        .await
    }

    fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<hyper::Result<Option<Request<Incoming>>>> {
        if self.reader.is_none() {
            ready!(self.socket.borrow_mut().poll_readable(cx));
        }
        let reader = self
            .reader
            .get_or_insert_with(|| Reader::new(SharedSocket(Rc::clone(&self.socket))));
        reader.poll_request(cx)
    }

    /// What `future` comes to; `None` if the client leaves before. Meanwhile reads the request's body,
    /// as `future` asks for it.
    async fn while_here<T>(&mut self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        poll_fn(|cx| {
            self.read_on(cx);
            let outcome = future.as_mut().poll(cx);
            self.read_on(cx);
            match outcome {
                Poll::Ready(output) => Poll::Ready(Some(output)),
                Poll::Pending => self.poll_left(cx).map(|()| None),
            }
        })
        .await
    }

    /// Reads the request's body, as long as there is more of it.
    fn read_on(&mut self, cx: &mut Context<'_>) {
        let Some(reader) = &mut self.reader else {
            return;
        };
        if self.request.as_ref().is_some_and(is_complete) {
            if let Some(reader) = self.reader.take() {
                let rest = reader.into_rest();
                self.socket.borrow_mut().rest = rest;
            }
        } else {
            // An error is the body's, whose reader gets it, too.
            let _ = reader.poll_on(cx);
        }
    }

    /// Waits until the client has left.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.reader.is_none() {
            self.stuck_check = None;
            return self.socket.borrow_mut().poll_left(cx);
        }
        let new_check = || Box::pin(sleep(STUCK_CHECK));
        let check = self.stuck_check.get_or_insert_with(new_check);
        while check.as_mut().poll(cx).is_ready() {
            if self.socket.borrow().is_reset() {
                return Poll::Ready(());
            }
            check.as_mut().reset(Instant::now() + STUCK_CHECK);
        }
        Poll::Pending
    }

    /// Whether the client has not sent all of its last request.
    fn may_be_sending(&self) -> bool {
        self.socket.borrow().scanner.is_in_body() && !self.request.as_ref().is_some_and(is_complete)
    }
}

fn is_complete(request: &Rc<RequestState>) -> bool {
    request.progress() == Progress::Complete
}

/// Says that nothing more will come, then takes what the client still sends, within bounds.
async fn linger(mut tcp: TcpStream) {
    if tcp.shutdown().await.is_err() {
        return;
    }
    let mut scratch = [0; 16 << 10];
    let mut left = LINGER_BYTES;
    while let Ok(Ok(count)) = timeout(LINGER_PAUSE, tcp.read(&mut scratch)).await {
        left = left.saturating_sub(count);
        if count == 0 || left == 0 {
            return;
        }
    }
}
