//! One client connection, from its acceptance to its last byte: hyper's server, and the ends that hyper
//! doesn't give.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1::Builder;
use hyper::service::service_fn;
use hyper::{Request, Version};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, sink};
use tokio::net::TcpStream;
use tokio::time::{Sleep, sleep, timeout};

use crate::exchange::{ConnectionState, Peer, Proxy};
use crate::flush::FlushNoting;
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS};
use crate::log;
use crate::sock_diag::SockDiag;

/// How long a head may take to come, and how long a connection may be idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long after the end has begun a connection that has sent no request yet may still do so: it was
/// made in the belief that it would be served.
const LAST_REQUEST_GRACE: Duration = Duration::from_millis(500);

/// How long [`Close::Linger`] reads on.
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// How often to look whether the send queue is empty, which the kernel doesn't announce.
const SEND_QUEUE_INTERVAL: Duration = Duration::from_millis(5);

/// How the server closes a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Close {
    /// By a reset: an HTTP/1.0 response without a length would otherwise look complete.
    Reset,
    /// Nothing is to be waited for.
    Immediate,
    /// Reads on for a while, since the client may still be sending: closing at once would reset the connection, and
    /// the client could lose the response (RFC 9112, section 9.6).
    Linger,
}

/// How hyper's connection ended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    Finished,
    /// The response's body failed.
    ResponseFailed,
    /// hyper could not read a request and has answered by itself.
    Malformed,
    /// The client is gone or does nothing.
    Failed,
}

impl Outcome {
    fn of(outcome: &hyper::Result<()>) -> Self {
        match outcome {
            Ok(()) => Self::Finished,
            Err(error) if error.is_user() => Self::ResponseFailed,
            Err(error) if error.is_parse() => Self::Malformed,
            Err(_) => Self::Failed,
        }
    }
}

/// How to close a connection after a last request of this version, which has come whole or not.
fn close_mode(outcome: Outcome, version: Option<Version>, is_complete: bool) -> Close {
    match (outcome, version) {
        (Outcome::ResponseFailed, Some(Version::HTTP_10)) => Close::Reset,
        (Outcome::Finished, Some(_)) if !is_complete => Close::Linger,
        (Outcome::Malformed, _) => Close::Linger,
        _ => Close::Immediate,
    }
}

/// Serves one client until either side is done.
pub(super) async fn serve(stream: TcpStream, peer: Peer, proxy: Rc<Proxy>) {
    // Without it, events wait for the acknowledgement of those before them (Nagle's algorithm).
    let _ = stream.set_nodelay(true);
    let state = Rc::new(ConnectionState::default());
    let (mut stream, early, outcome) = serve_http1(stream, peer, &state, &proxy).await;
    if let (Some(tunnel), Ok(())) = (state.take_tunnel(), &outcome) {
        // Boxed, so that only tunnels have its memory.
        return Box::pin(tunnel.run(stream, early, &proxy.stop)).await;
    }
    if let Err(error) = &outcome
        && error.is_parse()
    {
        // hyper has replied, or for HTTP/2 just given up.
        let status = if error.is_parse_too_large() { 431 } else { 400 };
        let (uid, reason) = (log::uid(peer.uid), error.to_string());
        log::line(format_args!(
            "refused uid={uid} status={status} reason={reason:?}"
        ));
    }
    let is_complete = state.is_request_complete();
    match close_mode(Outcome::of(&outcome), state.version(), is_complete) {
        Close::Immediate => {}
        Close::Reset => {
            let _ = timeout(LINGER_TIMEOUT, wait_until_acknowledged(&stream)).await;
            let _ = stream.set_zero_linger();
        }
        Close::Linger => {
            // Where hyper had nothing to say, it leaves that to us, too.
            let _ = stream.shutdown().await;
            let limit = match proxy.stop.has_begun() {
                true => LAST_REQUEST_GRACE,
                false => LINGER_TIMEOUT,
            };
            // Boxed, so that only those who linger have its buffer.
            let _ = timeout(limit, Box::pin(copy(&mut stream, &mut sink()))).await;
        }
    }
}

/// Waits until the peer has acknowledged all that was sent: a reset discards the rest. Gives up where the
/// kernel doesn't report it.
async fn wait_until_acknowledged(stream: &TcpStream) -> io::Result<()> {
    let Ok(kernel) = SockDiag::new(stream.local_addr()?) else {
        return Ok(());
    };
    while kernel.unacknowledged(stream)? > 0 {
        sleep(SEND_QUEUE_INTERVAL).await;
    }
    Ok(())
}

/// Answers requests until there is none any more. Gives the stream back, and what was read from it behind the
/// last request.
async fn serve_http1<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    peer: Peer,
    state: &Rc<ConnectionState>,
    proxy: &Rc<Proxy>,
) -> (S, Bytes, hyper::Result<()>) {
    let service = service_fn(|request: Request<Incoming>| {
        let (state, proxy) = (Rc::clone(state), Rc::clone(proxy));
        // Boxed, since it needs much memory, and an answer may take hours.
        Box::pin(async move { Ok::<_, Infallible>(proxy.answer(peer, state, request).await) })
    });
    let stream = FlushNoting {
        stream,
        state: state.flush.clone(),
    };
    let mut connection = Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_BYTES)
        .max_buf_size(MAX_HEAD_BYTES)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut ending = pin!(proxy.stop.begun());
    let mut is_watched = false;
    let mut grace: Option<Pin<Box<Sleep>>> = None;
    let outcome = poll_fn(|cx| {
        // Once is enough, since all this is one task.
        if !std::mem::replace(&mut is_watched, true) {
            let _ = ending.as_mut().poll(cx);
        }
        if proxy.stop.has_begun() {
            let grace = grace.get_or_insert_with(|| Box::pin(sleep(LAST_REQUEST_GRACE)));
            let is_over = grace.as_mut().poll(cx).is_ready();
            if state.version().is_some() {
                // What is in flight may finish; an idle connection ends.
                Pin::new(&mut connection).graceful_shutdown();
            } else if is_over {
                return Poll::Ready(Ok(()));
            }
        }
        Pin::new(&mut connection).poll(cx)
    })
    .await;
    let parts = connection.into_parts();
    (parts.io.into_inner().stream, parts.read_buf, outcome)
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::io::{AsyncReadExt, duplex};
    use tokio::net::TcpListener;
    use tokio::task::{LocalSet, yield_now};
    use tokio::time::Instant;

    use super::*;

    #[test]
    fn close_mode_depends_on_outcome_version_and_request() {
        use Outcome::{Failed, Finished, Malformed, ResponseFailed};
        let (http_10, http_11) = (Some(Version::HTTP_10), Some(Version::HTTP_11));
        let cases = [
            ("idle for too long", Finished, None, false, Close::Immediate),
            ("all answered", Finished, http_11, true, Close::Immediate),
            ("answered early", Finished, http_11, false, Close::Linger),
            (
                "answered early, 1.0",
                Finished,
                http_10,
                false,
                Close::Linger,
            ),
            (
                "first head malformed",
                Malformed,
                None,
                false,
                Close::Linger,
            ),
            (
                "next head malformed",
                Malformed,
                http_11,
                true,
                Close::Linger,
            ),
            ("truncated", ResponseFailed, http_11, true, Close::Immediate),
            (
                "truncated, 1.0",
                ResponseFailed,
                http_10,
                true,
                Close::Reset,
            ),
            ("client gone", Failed, http_11, false, Close::Immediate),
            ("client gone, 1.0", Failed, http_10, true, Close::Immediate),
        ];
        for (name, outcome, version, is_complete, expected) in cases {
            let mode = close_mode(outcome, version, is_complete);
            assert_eq!(mode, expected, "{name}");
        }
    }

    const REFUSED: &str = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

    /// How many milliseconds a connection lasts on which this is sent, if the end begins before.
    async fn lasts(sent: &str, is_ending: bool) -> u128 {
        let proxy = Proxy::for_tests("http://127.0.0.1:9/");
        let state = Rc::default();
        let (mut near, far) = duplex(1 << 16);
        near.write_all(sent.as_bytes()).await.unwrap();
        let meanwhile = async {
            // After the refusal, if there is one, the connection is idle.
            if sent == REFUSED {
                near.read_exact(&mut [0; 16]).await.unwrap();
            }
            if is_ending {
                proxy.stop.begin();
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
    async fn a_head_and_an_idle_connection_have_120_seconds() {
        for sent in ["", "POST /v1/resp", REFUSED] {
            let lasts = lasts(sent, false).await;
            assert!((120_000..120_010).contains(&lasts), "{sent:?}: {lasts} ms");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_end_a_connection_without_a_request_has_half_a_second() {
        for (sent, expected) in [("", 500), ("POST /v1/resp", 500), (REFUSED, 0)] {
            let lasts = lasts(sent, true).await;
            assert!(
                (expected..expected + 10).contains(&lasts),
                "{sent:?}: {lasts} ms"
            );
        }
    }

    #[tokio::test]
    async fn what_came_before_an_answer_breaks_off_goes_out_first_however_slowly() {
        const LENGTH: usize = 20_000;
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::for_tests(&format!("http://{}/", upstream.local_addr().unwrap()));
        let state = Rc::default();
        // The client takes little at once, and nothing before the upstream is gone.
        let (mut near, far) = duplex(1000);
        let request = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n";
        near.write_all(request).await.unwrap();
        let breaking = async {
            let (mut stream, _) = upstream.accept().await.unwrap();
            assert_ne!(stream.read(&mut [0; 1000]).await.unwrap(), 0);
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            let answer = format!("{head}{:x}\r\n{}\r\n", LENGTH, "#".repeat(LENGTH));
            stream.write_all(answer.as_bytes()).await.unwrap();
            drop(stream);
            for _ in 0..1000 {
                yield_now().await;
            }
            let mut come = Vec::new();
            near.read_to_end(&mut come).await.unwrap();
            come
        };
        let serving = async { serve_http1(far, Peer::default(), &state, &proxy).await.2 };
        let both = async { tokio::join!(serving, breaking) };
        let (outcome, come) = LocalSet::new().run_until(both).await;
        assert!(outcome.is_err_and(|error| error.is_user()));
        assert_eq!(come.iter().filter(|&&byte| byte == b'#').count(), LENGTH);
        assert!(!come.ends_with(b"0\r\n\r\n"));
    }

    /// What a client gets that sends these pieces 50 s apart and then nothing more, and after how many milliseconds
    /// its connection ends. The upstream says this at once and reads on.
    async fn stalls(pieces: &[&str], says: &str) -> (String, u128) {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::for_tests(&format!("http://{}/", upstream.local_addr().unwrap()));
        let state = Rc::default();
        let (mut near, far) = duplex(1 << 16);
        let begun = Instant::now();
        let reading = async {
            let (mut stream, _) = upstream.accept().await.unwrap();
            stream.write_all(says.as_bytes()).await.unwrap();
            let _ = copy(&mut stream, &mut sink()).await;
            pending::<()>().await;
        };
        let sending = async {
            for (number, piece) in pieces.iter().enumerate() {
                let wait = Duration::from_secs(if number == 0 { 0 } else { 50 });
                sleep(wait).await;
                near.write_all(piece.as_bytes()).await.unwrap();
            }
            let mut came = Vec::new();
            near.read_to_end(&mut came).await.unwrap();
            String::from_utf8(came).unwrap()
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
    async fn stalled_request_body_is_a_408_after_60_seconds() {
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
        let begins = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n";
        let (came, lasted) = stalls(&[&length], begins).await;
        assert!((60_000..60_010).contains(&lasted), "{lasted} ms");
        assert!(came.starts_with("HTTP/1.1 200 "), "{came}");
        assert!(came.ends_with("\r\nx\r\n"), "broken off: {came}");
    }

    #[tokio::test(start_paused = true)]
    async fn body_that_waits_for_a_stuck_upstream_has_no_time_limit() {
        let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::for_tests(&format!("http://{}/", upstream.local_addr().unwrap()));
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
