//! The stand-in upstream: hyper behind rustls, on a thread of its own; and what both ends say to each other.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll, ready};
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{AUTHORIZATION, CONNECTION, HeaderValue, UPGRADE};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Outcome, runtime};

/// The key that every proxy adds; requests without it are refused.
pub(crate) const KEY: &str = "sk-bench-0123456789abcdef0123456789abcdef0123456789abcdef";

/// The name in the certificate.
pub(crate) const HOST: &str = "localhost";

/// The header that says what is wanted, and in an answer, when the request's body began to come.
pub(crate) const TASK: &str = "x-bench";
/// The body taken to its end, then a small answer.
pub(crate) const ANSWER: &str = "answer";
/// An event every [`EVENT_INTERVAL`] until the client leaves.
pub(crate) const STREAM: &str = "stream";
/// [`HELD_EVENTS`] at once, then silence until the client leaves.
pub(crate) const HOLD: &str = "hold";

/// The body of a small request and of its answer.
static SMALL: [u8; 1 << 10] = [b'x'; 1 << 10];

/// One event of a stream, in bytes: about what the Responses API sends for a word.
pub(crate) const EVENT_BYTES: usize = 256;

/// The pace of a model that says fifty words a second.
const EVENT_INTERVAL: Duration = Duration::from_millis(20);

/// More than the 8 KiB that OpenAI's proxy waits for before it lets anything go.
const HELD_EVENTS: usize = 40;

/// What is read from a socket at once. rustls itself would ask for 4 KiB at a time, which would make
/// uploads the stand-in's limit and not the proxy's.
const READ_BYTES: usize = 64 << 10;

/// Headers of an answer, about what the real upstream sends.
const HEADERS: [(&str, &str); 8] = [
    ("content-type", "text/event-stream; charset=utf-8"),
    ("x-request-id", "req_0123456789abcdef0123456789abcdef"),
    ("openai-organization", "org-0123456789"),
    ("openai-processing-ms", "123"),
    ("openai-version", "2020-10-01"),
    ("x-ratelimit-limit-requests", "10000"),
    ("x-ratelimit-remaining-requests", "9999"),
    ("strict-transport-security", "max-age=31536000; preload"),
];

/// Microseconds since the first call; both ends are in one process and share the clock.
pub(crate) fn now() -> f64 {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGIN.elapsed().as_secs_f64() * 1e6
}

/// A body, at either end: the parts that are sent to it, until its senders are gone. None is an event, which
/// gets the time at which it is written.
pub(crate) struct Parts {
    parts: UnboundedReceiver<Option<Bytes>>,
    /// In bytes, where it is known.
    length: Option<u64>,
}

impl Parts {
    pub(crate) fn new(length: Option<u64>) -> (UnboundedSender<Option<Bytes>>, Self) {
        let (sender, parts) = unbounded_channel();
        (sender, Self { parts, length })
    }

    /// The body of a small request or answer.
    pub(crate) fn small() -> Self {
        let (sender, body) = Self::new(Some(SMALL.len() as u64));
        let _ = sender.send(Some(Bytes::from_static(&SMALL)));
        body
    }
}

impl Body for Parts {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let part = ready!(self.parts.poll_recv(context));
        Poll::Ready(part.map(|part| Ok(Frame::data(part.unwrap_or_else(event)))))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::new, SizeHint::with_exact)
    }
}

fn event() -> Bytes {
    let head = format!("id: {:020.3}\nevent: response.output_text.delta\n", now());
    let data = "data: {\"type\":\"response.output_text.delta\",\"delta\":\"";
    let width = EVENT_BYTES - head.len() - data.len();
    format!("{head}{data}{:x>width$}", "\"}\n\n").into()
}

/// When an event was written.
pub(crate) fn stamp(event: &[u8]) -> Option<f64> {
    std::str::from_utf8(event.get(4..24)?).ok()?.parse().ok()
}

/// Streams that send an event whenever [`pace`] says so.
static PACED: Mutex<Vec<UnboundedSender<Option<Bytes>>>> = Mutex::new(Vec::new());

/// Tells streams when to send, one after the other and evenly spread, so that each event goes alone. A
/// thread, as the event loop's timers are no finer than a millisecond.
fn pace() -> ! {
    let mut next = Instant::now();
    loop {
        let streams = PACED.lock().unwrap().clone();
        let turns = streams.len().max(1);
        for turn in 0..turns {
            next += EVENT_INTERVAL / turns as u32;
            thread::sleep(next.saturating_duration_since(Instant::now()));
            let _ = streams.get(turn).map(|stream| stream.send(None));
        }
        PACED.lock().unwrap().retain(|stream| !stream.is_closed());
        // What was missed is not made up for: that would be a burst.
        next = next.max(Instant::now());
    }
}

/// The running stand-in.
pub(crate) struct Upstream {
    pub(crate) port: u16,
    /// Its certificate.
    pub(crate) ca: PathBuf,
    /// For who comes directly.
    pub(crate) connector: TlsConnector,
}

impl Upstream {
    /// Starts it, with a certificate of this run, for the rest of the process's life.
    pub(crate) fn start(folder: &Path) -> Outcome<Self> {
        let certified = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
        let (certificate, key) = (certified.cert, certified.signing_key.serialize_der());
        let ca = folder.join("ca.pem");
        std::fs::write(&ca, certificate.pem())?;
        let mut roots = RootCertStore::empty();
        roots.add(certificate.der().clone())?;
        let client = ClientConfig::builder().with_root_certificates(roots);
        let connector = Arc::new(client.with_no_client_auth()).into();
        let server = ServerConfig::builder().with_no_client_auth();
        let server = server.with_single_cert(vec![certificate.into()], key.try_into()?)?;
        let runtime = runtime()?;
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
        let port = listener.local_addr()?.port();
        thread::spawn(move || runtime.block_on(serve(listener, Arc::new(server).into())));
        thread::spawn(|| pace());
        Ok(Self {
            port,
            ca,
            connector,
        })
    }
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor) -> std::io::Result<()> {
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let tls = acceptor.accept(BufReader::with_capacity(READ_BYTES, tcp));
        tokio::spawn(async move {
            let service = hyper::service::service_fn(answer);
            let server = hyper::server::conn::http1::Builder::new();
            // A client that leaves its stream is an error here, and what is expected.
            let _ = server
                .serve_connection(TokioIo::new(tls.await?), service)
                .with_upgrades()
                .await;
            std::io::Result::Ok(())
        });
    }
}

/// Accepts a WebSocket handshake and echoes what comes.
fn websocket(mut request: Request<Incoming>) -> Response<Parts> {
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await?);
        let mut buffer = [0; EVENT_BYTES];
        while let count @ 1.. = stream.read(&mut buffer).await? {
            stream.write_all(&buffer[..count]).await?;
            stream.flush().await?;
        }
        Outcome::Ok(())
    });
    let mut response = Response::new(Parts::new(Some(0)).1);
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    // That of the load's key.
    let accept = HeaderValue::from_static("s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    headers.insert("sec-websocket-accept", accept);
    response
}

async fn answer(request: Request<Incoming>) -> Outcome<Response<Parts>> {
    let has_key = request
        .headers()
        .get(AUTHORIZATION)
        .is_some_and(|key| key.as_bytes() == format!("Bearer {KEY}").as_bytes());
    if has_key && request.headers().contains_key(UPGRADE) {
        return Ok(websocket(request));
    }
    let (head, mut body) = request.into_parts();
    let mut first = 0.0;
    while let Some(frame) = body.frame().await {
        frame?;
        first = if first == 0.0 { now() } else { first };
    }
    let header = |name| head.headers.get(name).map(HeaderValue::as_bytes);
    let is_task = |name: &str| header(TASK) == Some(name.as_bytes());
    let (sender, parts) = Parts::new(None);
    let is_small = is_task(ANSWER);
    let mut response = Response::new(if is_small { Parts::small() } else { parts });
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(TASK, first.to_string().try_into()?);
    if !has_key {
        *response.status_mut() = StatusCode::UNAUTHORIZED;
    } else if is_task(STREAM) {
        PACED.lock().unwrap().push(sender);
    } else if is_task(HOLD) {
        (0..HELD_EVENTS).try_for_each(|_| sender.send(None))?;
        // The stream's end never comes.
        std::mem::forget(sender);
    }
    Ok(response)
}
