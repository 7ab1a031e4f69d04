//! The upstream of all proxies, hyper's server over rustls on a thread of its own, and what it and the load
//! agree on.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONNECTION, UPGRADE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::ServerConfig;
use tokio::io::{BufReader, copy, split};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_rustls::TlsAcceptor;

use super::{Result, runtime};

/// The API key that each proxy adds. The upstream serves no request without it.
pub(crate) const KEY: &str = "sk-bench-0123456789abcdef0123456789abcdef0123456789abcdef";

/// The host name in the upstream's certificate.
pub(crate) const HOST: &str = "localhost";

/// The request header that names the task.
pub(crate) const TASK: &str = "x-bench";
pub(crate) type Task = &'static str;
/// Task: read the body to its end, then send [`SMALL`].
pub(crate) const RESPOND: Task = "respond";
/// Task: send [`FIRST_EVENTS`] at once, then those of [`send_events`] until the client disconnects.
pub(crate) const STREAM: Task = "stream";
/// Task: accept a WebSocket handshake and echo what is received.
pub(crate) const TUNNEL: Task = "tunnel";

/// The body of a small request and of a small response.
pub(crate) static SMALL: [u8; 1 << 10] = [b'x'; 1 << 10];

/// Size of an event, in bytes. The Responses API sends about as much for a word.
pub(crate) const EVENT_BYTES: usize = 256;

/// Where an event contains the result of [`now`] at the time when it was written.
pub(crate) const TIMESTAMP: Range<usize> = 4..24;

/// Interval of a stream's events: a model that generates 50 words a second.
const EVENT_INTERVAL: Duration = Duration::from_millis(20);

/// Events at the start of a stream: more than the 8 KiB that OpenAI's proxy buffers.
const FIRST_EVENTS: usize = 40;

/// Size of a read from a socket, in bytes. rustls would read 4 KiB at a time, and the upstream would limit the
/// throughput of uploads.
const READ_BYTES: usize = 64 << 10;

/// Headers of a response, about as many and as long as OpenAI's.
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

/// The open streams.
static STREAMS: Mutex<Vec<UnboundedSender<()>>> = Mutex::new(Vec::new());

/// Microseconds since the first call. Load and upstream share a process and therefore the clock.
pub(crate) fn now() -> f64 {
    static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);
    BEGIN.elapsed().as_secs_f64() * 1e6
}

/// A stream of events. Each is formatted when hyper is about to write it, so that its timestamp is exact.
struct Events(UnboundedReceiver<()>);

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let event = self.0.poll_recv(context);
        event.map(|event| event.map(|()| Ok(Frame::data(format_event()))))
    }
}

fn format_event() -> Bytes {
    const PADDING: usize = EVENT_BYTES - "id: 01234567890123456789\ndata: ".len();
    format!("id: {:020.3}\ndata: {:x>PADDING$}", now(), "\n\n").into()
}

/// Sends an event to each open stream per [`EVENT_INTERVAL`], evenly spread over it, for `duration`. Blocks, as
/// the event loop's timers have a resolution of 1 ms.
pub(crate) fn send_events(duration: Duration) {
    let mut streams = STREAMS.lock().unwrap();
    streams.retain(|stream| !stream.is_closed());
    let mut next = Instant::now();
    let end = next + duration;
    for stream in streams.iter().cycle().take_while(|_| Instant::now() < end) {
        // Time lost is not made up for, which would be a burst.
        next = (next + EVENT_INTERVAL / streams.len() as u32).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
        let _ = stream.send(());
    }
}

/// Starts the upstream, which runs until the process exits, and returns its port. Writes its certificate, a new
/// one, to `directory`.
pub(crate) fn start(directory: &Path) -> Result<u16> {
    let certified = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
    let key = certified.signing_key.serialize_der().try_into()?;
    std::fs::write(directory.join("ca.pem"), certified.cert.pem())?;
    let config = ServerConfig::builder().with_no_client_auth();
    let config = config.with_single_cert(vec![certified.cert.into()], key)?;
    let runtime = runtime()?;
    let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || runtime.block_on(serve(listener, Arc::new(config).into())));
    Ok(port)
}

async fn serve(listener: TcpListener, acceptor: TlsAcceptor) -> Result<()> {
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let tls = acceptor.accept(BufReader::with_capacity(READ_BYTES, tcp));
        tokio::spawn(async move {
            let stream = TokioIo::new(tls.await?);
            let connection = http1::Builder::new().serve_connection(stream, service_fn(handle));
            // Fails when a client disconnects from an open stream, which is how streams end here.
            let _ = connection.with_upgrades().await;
            std::io::Result::Ok(())
        });
    }
}

async fn handle(mut request: Request<Incoming>) -> Result<Response<Either<Full<Bytes>, Events>>> {
    let key = request.headers().get(AUTHORIZATION).ok_or("no key")?;
    let task = request.headers().get(TASK).ok_or("no task")?.clone();
    if *key != format!("Bearer {KEY}") {
        return Err("wrong key".into());
    }
    if task == TUNNEL {
        tokio::spawn(echo(hyper::upgrade::on(&mut request)));
        let response = Response::builder()
            .status(101)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            // For the key of RFC 6455, section 1.3, which the load sends.
            .header("sec-websocket-accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        return Ok(response.body(Either::Left(Full::default()))?);
    }
    let mut body = request.into_body();
    while let Some(frame) = body.frame().await {
        frame?;
    }
    let mut response = Response::builder();
    for (name, value) in HEADERS {
        response = response.header(name, value);
    }
    if task == RESPOND {
        return Ok(response.body(Either::Left(Full::from(&SMALL[..])))?);
    }
    let (sender, receiver) = unbounded_channel();
    (0..FIRST_EVENTS).try_for_each(|_| sender.send(()))?;
    STREAMS.lock().unwrap().push(sender);
    Ok(response.body(Either::Right(Events(receiver)))?)
}

async fn echo(upgrade: OnUpgrade) -> Result<u64> {
    let (mut reader, mut writer) = split(TokioIo::new(upgrade.await?));
    Ok(copy(&mut reader, &mut writer).await?)
}
