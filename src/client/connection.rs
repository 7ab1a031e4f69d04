//! One client connection: hyper's server, and closing the connection so that no response is lost.

use std::future::{Future, poll_fn};
use std::{io, pin::Pin, pin::pin, rc::Rc, task::Poll, time::Duration};

use hyper::{Version, body::Bytes, server::conn::http1::Builder, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, sink};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::flush_noting::FlushNoting;
use crate::exchange::{ConnectionState, Handler, Peer};
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS};
use crate::{joining_stream::JoiningStream, log, sock_diag::SockDiag};

/// How long a request's head may take, and how long a connection may be idle between requests.
///
/// A connection has one timer for this. hyper's would be set anew for each request, which takes 2 % of a
/// request's CPU.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a connection that has sent no request yet may still do so once shutdown has started: the
/// client connected in the belief that it would be served. [`Close::Linger`] reads on no longer then.
const SHUTDOWN_GRACE: Duration = Duration::from_millis(500);

/// How long [`Close::Linger`] reads on, and [`Close::Reset`] waits.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the send queue is checked. The kernel doesn't report that it is empty.
const SEND_QUEUE_INTERVAL: Duration = Duration::from_millis(5);

/// How the server closes a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Close {
    /// With a reset once all is sent: an HTTP/1.0 response without a length would otherwise look complete.
    Reset,
    Immediate,
    /// After reading on for a while, since the client may still be sending: closing at once would reset the
    /// connection, and the client could lose the response (RFC 9112, section 9.6).
    Linger,
}

/// How to close a connection on which hyper's work ended like this.
fn close_mode(outcome: &hyper::Result<()>, state: &ConnectionState) -> Close {
    match (outcome, state.version()) {
        (Err(error), Some(Version::HTTP_10)) if error.is_user() => Close::Reset,
        (Err(error), _) if error.is_parse() => Close::Linger,
        (Ok(()), Some(_)) if !state.is_request_complete() => Close::Linger,
        _ => Close::Immediate,
    }
}

/// Serves one client until either side is done.
pub(super) async fn serve(stream: TcpStream, peer: Peer, handler: &Handler) {
    // Without it, events wait for the acknowledgement of those before them (Nagle's algorithm).
    let _ = stream.set_nodelay(true);
    let state = Rc::new(ConnectionState::default());
    let (mut stream, early, outcome) = serve_http1(stream, peer, &state, handler).await;
    if let (Some(tunnel), Ok(())) = (state.take_tunnel(), &outcome) {
        // Boxed, so that only tunnels have its memory.
        return Box::pin(tunnel.run(stream, early, &handler.shutdown)).await;
    }
    if let Some(error) = outcome.as_ref().err().filter(|error| error.is_parse()) {
        // hyper has responded, or to HTTP/2 just closed.
        let status = if error.is_parse_too_large() { 431 } else { 400 };
        log::rejection(peer.uid, status, &error.to_string());
    }
    match close_mode(&outcome, &state) {
        Close::Immediate => {}
        Close::Reset => {
            let _ = timeout(LINGER_TIMEOUT, wait_until_acknowledged(&stream)).await;
            let _ = stream.set_zero_linger();
        }
        Close::Linger => {
            // hyper shuts the stream down only after a response of its own.
            let _ = stream.shutdown().await;
            let grace = handler.shutdown.is_triggered().then_some(SHUTDOWN_GRACE);
            let limit = grace.unwrap_or(LINGER_TIMEOUT);
            // Boxed, so that only lingering connections have its buffer.
            let _ = timeout(limit, Box::pin(copy(&mut stream, &mut sink()))).await;
        }
    }
}

/// Waits until the peer has acknowledged all bytes: a reset discards the others. Gives up where the kernel
/// doesn't report them.
async fn wait_until_acknowledged(stream: &TcpStream) -> io::Result<()> {
    let kernel = SockDiag::new(stream.local_addr()?).map_err(io::Error::other)?;
    while kernel.unacknowledged(stream)? > 0 {
        sleep(SEND_QUEUE_INTERVAL).await;
    }
    Ok(())
}

/// Serves requests until the connection ends. Returns the stream and what was read from it behind the last
/// request.
async fn serve_http1<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    peer: Peer,
    state: &Rc<ConnectionState>,
    handler: &Handler,
) -> (S, Bytes, hyper::Result<()>) {
    // Boxed, since it is large, and gone once the response has begun.
    let service = service_fn(|request| Box::pin(handler.handle(peer, state, request)));
    let stream = JoiningStream(stream);
    let stream = FlushNoting { stream, state };
    let mut connection = Builder::new()
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_BYTES)
        .max_buf_size(MAX_HEAD_BYTES)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    state.begin_wait();
    let mut timer = pin!(sleep(HEAD_TIMEOUT));
    let mut shutdown = pin!(handler.shutdown.wait());
    let mut is_first = true;
    let serving = poll_fn(|cx| {
        // Both wake this task when they are ready. To poll them before that would only take time.
        if std::mem::take(&mut is_first) {
            let _ = (timer.as_mut().poll(cx), shutdown.as_mut().poll(cx));
        }
        if handler.shutdown.is_triggered() {
            return Poll::Ready(None);
        }
        if timer.is_elapsed() {
            let since = state.waiting_since().unwrap_or_else(Instant::now);
            if since.elapsed() >= HEAD_TIMEOUT {
                return Poll::Ready(Some(Ok(())));
            }
            timer.as_mut().reset(since + HEAD_TIMEOUT);
            let _ = timer.as_mut().poll(cx);
        }
        Pin::new(&mut connection).poll(cx).map(Some)
    });
    let outcome = 'served: {
        if let Some(outcome) = serving.await {
            break 'served outcome;
        }
        if state.version().is_none() {
            let outcome = timeout(SHUTDOWN_GRACE, &mut connection).await;
            if outcome.is_ok() || state.version().is_none() {
                break 'served outcome.unwrap_or(Ok(()));
            }
        }
        // A request in flight may finish; an idle connection closes.
        Pin::new(&mut connection).graceful_shutdown();
        (&mut connection).await
    };
    let parts = connection.into_parts();
    (parts.io.into_inner().stream.0, parts.read_buf, outcome)
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use http_body_util::Empty;
    use hyper::Response;

    use tokio::io::{AsyncReadExt, duplex};
    use tokio::net::TcpListener;
    use tokio::task::{LocalSet, yield_now};

    use super::*;

    /// The outcome of a connection with a failing service, after a client sends this and closes.
    async fn outcome(sent: &str) -> hyper::Result<()> {
        let (mut near, far) = duplex(1000);
        near.write_all(sent.as_bytes()).await.unwrap();
        near.shutdown().await.unwrap();
        let service = service_fn(async |_| Err::<Response<Empty<Bytes>>, _>("failed"));
        Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(far), service)
            .await
    }

    #[tokio::test]
    async fn close_mode_depends_on_outcome_version_and_request() {
        let finished = Ok(());
        let malformed = outcome("junk\r\n\r\n").await;
        let failed = outcome("GET / HTTP/1.1\r\n").await;
        let response_failed = outcome("GET / HTTP/1.1\r\n\r\n").await;
        assert!(failed.is_err() && response_failed.is_err());
        let (http_10, http_11) = (Some(Version::HTTP_10), Some(Version::HTTP_11));
        let cases = [
            (
                "idle for too long",
                &finished,
                None,
                false,
                Close::Immediate,
            ),
            ("all complete", &finished, http_11, true, Close::Immediate),
            ("early response", &finished, http_11, false, Close::Linger),
            (
                "early response, 1.0",
                &finished,
                http_10,
                false,
                Close::Linger,
            ),
            (
                "first head malformed",
                &malformed,
                None,
                false,
                Close::Linger,
            ),
            (
                "next head malformed",
                &malformed,
                http_11,
                true,
                Close::Linger,
            ),
            (
                "truncated",
                &response_failed,
                http_11,
                true,
                Close::Immediate,
            ),
            (
                "truncated, 1.0",
                &response_failed,
                http_10,
                true,
                Close::Reset,
            ),
            ("client gone", &failed, http_11, false, Close::Immediate),
            ("client gone, 1.0", &failed, http_10, true, Close::Immediate),
        ];
        for (name, outcome, version, is_complete, expected) in cases {
            let state = ConnectionState::for_tests(version, is_complete);
            assert_eq!(close_mode(outcome, &state), expected, "{name}");
        }
    }

    const REJECTED: &str = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

    /// How many milliseconds a connection lasts on which this is sent, with or without a shutdown.
    async fn lasts(sent: &str, is_shutting_down: bool) -> u128 {
        let proxy = Handler::for_tests("http://127.0.0.1:9/");
        let state = Rc::default();
        let (mut near, far) = duplex(1 << 16);
        near.write_all(sent.as_bytes()).await.unwrap();
        let meanwhile = async {
            // After a rejection, the connection is idle.
            if sent == REJECTED {
                near.read_exact(&mut [0; 16]).await.unwrap();
            }
            if is_shutting_down {
                proxy.shutdown.trigger();
            }
            pending::<()>().await;
        };
        let begun = Instant::now();
        tokio::select! {
            _ = serve_http1(far, Peer::default(), &state, &proxy) => {}
            () = meanwhile => {}
        }
        begun.elapsed().as_millis()
    }

    #[tokio::test(start_paused = true)]
    async fn heads_and_idle_connections_time_out_after_120_s() {
        for sent in ["", "POST /v1/resp", REJECTED] {
            let lasts = lasts(sent, false).await;
            assert!((120_000..120_010).contains(&lasts), "{sent:?}: {lasts} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn connection_without_request_has_half_a_second_at_shutdown() {
        for (sent, expected) in [("", 500), ("POST /v1/resp", 500), (REJECTED, 0)] {
            let lasts = lasts(sent, true).await;
            assert!(
                (expected..expected + 10).contains(&lasts),
                "{sent:?}: {lasts} ms"
            );
        }
    }

    #[tokio::test]
    async fn bytes_before_a_truncation_are_flushed_to_a_slow_client() {
        const LENGTH: usize = 20_000;
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Handler::for_tests(&format!("http://{}/", upstream.local_addr().unwrap()));
        let state = Rc::default();
        // The client reads little at once, and nothing before the upstream is gone.
        let (mut near, far) = duplex(1000);
        let request = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n";
        near.write_all(request).await.unwrap();
        let failing = async {
            let (mut stream, _) = upstream.accept().await.unwrap();
            assert_ne!(stream.read(&mut [0; 1000]).await.unwrap(), 0);
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            let response = format!("{head}{LENGTH:x}\r\n{}\r\n", "#".repeat(LENGTH));
            stream.write_all(response.as_bytes()).await.unwrap();
            drop(stream);
            for _ in 0..1000 {
                yield_now().await;
            }
            let mut received = Vec::new();
            near.read_to_end(&mut received).await.unwrap();
            received
        };
        let serving = async { serve_http1(far, Peer::default(), &state, &proxy).await.2 };
        let both = async { tokio::join!(serving, failing) };
        let (outcome, received) = LocalSet::new().run_until(both).await;
        assert!(outcome.is_err_and(|error| error.is_user()));
        assert_eq!(
            received.iter().filter(|&&byte| byte == b'#').count(),
            LENGTH
        );
        assert!(!received.ends_with(b"0\r\n\r\n"));
    }

    /// The response to a client that sends these parts 50 s apart and then stalls, and how many milliseconds
    /// its connection lasts. The upstream sends `early` at once and reads on.
    async fn stalls(pieces: &[&str], early: &str) -> (String, u128) {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Handler::for_tests(&format!("http://{}/", upstream.local_addr().unwrap()));
        let state = Rc::default();
        let (mut near, far) = duplex(1 << 16);
        let begun = Instant::now();
        let reading = async {
            let (mut stream, _) = upstream.accept().await.unwrap();
            stream.write_all(early.as_bytes()).await.unwrap();
            let _ = copy(&mut stream, &mut sink()).await;
            pending::<()>().await;
        };
        let sending = async {
            for (number, piece) in pieces.iter().enumerate() {
                let wait = Duration::from_secs(if number == 0 { 0 } else { 50 });
                sleep(wait).await;
                near.write_all(piece.as_bytes()).await.unwrap();
            }
            let mut received = Vec::new();
            near.read_to_end(&mut received).await.unwrap();
            String::from_utf8(received).unwrap()
        };
        let serving = async { drop(serve_http1(far, Peer::default(), &state, &proxy).await) };
        let tasks = LocalSet::new();
        let both = tasks.run_until(async { tokio::join!(serving, sending) });
        let ((), came) = tokio::select! {
            () = reading => unreachable!(),
            both = both => both,
        };
        (came, begun.elapsed().as_millis())
    }

    #[tokio::test(start_paused = true)]
    async fn idle_connection_times_out_120_s_after_a_response() {
        let request = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let response = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let limit = Duration::from_secs(1000);
        let outcome = timeout(limit, stalls(&[request], response)).await;
        let (came, lasted) = outcome.expect("times out");
        assert!(came.ends_with("\r\n\r\nok"), "{came}");
        assert!((120_000..120_010).contains(&lasted), "{lasted} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn stalled_request_body_gets_408_after_60_s() {
        let head = |framing| {
            format!("POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n")
        };
        let (length, chunked) = (
            head("Content-Length: 9"),
            head("Transfer-Encoding: chunked"),
        );
        for (pieces, expected) in [
            (vec![&*length], 60_000),
            (vec![&*chunked, "2\r\nab"], 110_000),
            (vec![&*length, "a", "b", "c"], 210_000),
        ] {
            let (came, lasted) = stalls(&pieces, "").await;
            assert!(came.starts_with("HTTP/1.1 408 "), "{pieces:?}: {came}");
            assert!(came.contains("connection: close\r\n"), "{pieces:?}: {came}");
            assert!(came.contains("request_timeout"), "{pieces:?}: {came}");
            assert!(
                (expected..expected + 10).contains(&lasted),
                "{pieces:?}: {lasted} ms"
            );
        }
        let early = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n";
        let (came, lasted) = stalls(&[&length], early).await;
        assert!((60_000..60_010).contains(&lasted), "{lasted} ms");
        assert!(came.starts_with("HTTP/1.1 200 "), "{came}");
        assert!(came.ends_with("\r\nx\r\n"), "truncated: {came}");
    }

    #[tokio::test(start_paused = true)]
    async fn body_that_waits_for_a_stuck_upstream_has_no_time_limit() {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Handler::for_tests(&format!("http://{}/", upstream.local_addr().unwrap()));
        let state = Rc::default();
        let (mut near, far) = duplex(1 << 16);
        let sending = async {
            let head = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n";
            near.write_all(head.as_bytes()).await.unwrap();
            let piece = [b'x'; 1 << 16];
            loop {
                near.write_all(&piece).await.unwrap();
            }
        };
        let serving = serve_http1(far, Peer::default(), &state, &proxy);
        let tasks = LocalSet::new();
        tokio::select! {
            _ = tasks.run_until(serving) => panic!("it ends"),
            () = sending => {}
            () = sleep(Duration::from_secs(600)) => {}
        }
    }
}
