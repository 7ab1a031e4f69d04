//! One client connection, from its acceptance to its last byte: hyper's server, and the ends that hyper
//! doesn't give.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
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

use crate::exchange::{Client, Proxy};
use crate::limits::{MAX_HEAD_BYTES, MAX_HEADERS};

/// How long a head may take to come, and how long a connection may be idle between requests.
const HEAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long after the end has begun a connection that has sent no request yet may still do so: it was
/// made in the belief that it would be served.
const LAST_REQUEST_GRACE: Duration = Duration::from_millis(500);

/// How long what a client still sends is taken when its answer is complete. Closing at once would reset
/// the connection, and the client could lose the answer (RFC 9112, section 9.6).
const LINGER_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves one client until either side is done.
pub(super) async fn serve(stream: TcpStream, client: Client, proxy: Rc<Proxy>) {
    // Without it, events wait for the acknowledgement of those before them (Nagle's algorithm).
    let _ = stream.set_nodelay(true);
    let client = Rc::new(client);
    let (mut stream, early, outcome) = converse(stream, &client, &proxy).await;
    if let (Some(tunnel), Ok(())) = (client.tunnel.take(), &outcome) {
        // Boxed, so that only tunnels have its memory.
        return Box::pin(tunnel.run(stream, early, &proxy.stop)).await;
    }
    match outcome {
        // To such a client the usual end of the connection is that of a whole answer.
        Err(error) if error.is_user() && client.version.get() == Some(Version::HTTP_10) => {
            let _ = stream.set_zero_linger();
        }
        Ok(()) if client.has_sent_all.get() || client.version.get().is_none() => {}
        Err(error) if !error.is_parse() => {}
        _ => {
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

/// Answers requests until there is none any more. Gives the stream back, and what was read from it behind the
/// last request.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    client: &Rc<Client>,
    proxy: &Rc<Proxy>,
) -> (S, Bytes, hyper::Result<()>) {
    let service = service_fn(|request: Request<Incoming>| {
        let (client, proxy) = (Rc::clone(client), Rc::clone(proxy));
        // Boxed, since it needs much memory, and an answer may take hours.
        Box::pin(async move { Ok::<_, Infallible>(proxy.answer(client, request).await) })
    });
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
            if client.version.get().is_some() {
                // What is in flight may finish; an idle connection ends.
                Pin::new(&mut connection).graceful_shutdown();
            } else if is_over {
                return Poll::Ready(Ok(()));
            }
        }
        client.turn.set(client.turn.get() + 1);
        let outcome = Pin::new(&mut connection).poll(cx);
        if outcome.is_pending() {
            client.send_on(cx);
        }
        outcome
    })
    .await;
    let parts = connection.into_parts();
    (parts.io.into_inner(), parts.read_buf, outcome)
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::io::{AsyncReadExt, duplex};
    use tokio::net::TcpListener;
    use tokio::task::yield_now;
    use tokio::time::Instant;

    use super::*;

    const REFUSED: &str = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";

    /// How many milliseconds a connection lasts on which this is sent, if the end begins before.
    async fn lasts(sent: &str, is_ending: bool) -> u128 {
        let proxy = Proxy::for_tests("http://127.0.0.1:9/");
        let client = Rc::default();
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
            _ = converse(far, &client, &proxy) => {}
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
        let client = Rc::default();
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
        let serving = async { converse(far, &client, &proxy).await.2 };
        let (outcome, come) = tokio::join!(serving, breaking);
        assert!(outcome.is_err_and(|error| error.is_user()));
        assert_eq!(come.iter().filter(|&&byte| byte == b'#').count(), LENGTH);
        assert!(!come.ends_with(b"0\r\n\r\n"));
    }
}
