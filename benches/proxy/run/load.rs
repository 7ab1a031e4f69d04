//! The load: Codex's requests by hyper's client, through a proxy or straight to the stand-in upstream. Times
//! are in microseconds.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::HeaderValue;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use super::Outcome;
use super::upstream::{ANSWER, EVENT_BYTES, HOLD, HOST, KEY, Parts, STREAM, TASK, now, stamp};

/// How long a new connection may go unserved, and how many are tried.
const PATIENCE: Duration = Duration::from_secs(2);
const ATTEMPTS: usize = 5;

/// Connections that had to be tried again since this was last set to 0.
pub(crate) static RETRIES: AtomicUsize = AtomicUsize::new(0);

/// What [`take_delays`] gives.
static DELAYS: Mutex<Vec<f64>> = Mutex::new(Vec::new());

/// What of a large body is sent at once.
const BLOCK_BYTES: u64 = 256 << 10;

/// Streams that are opened at a time.
const OPENED_AT_ONCE: usize = 16;

/// A request's headers as Codex makes them, in what they say and in number.
const HEADERS: [(&str, &str); 8] = [
    ("host", "127.0.0.1"),
    ("content-type", "application/json"),
    ("accept", "text/event-stream"),
    ("user-agent", "codex_cli_rs/0.0.0 (Linux; x86_64) unknown"),
    ("originator", "codex_cli_rs"),
    ("openai-beta", "responses=experimental"),
    ("session_id", "01890a5d-ac96-774b-bcce-b302099a8057"),
    ("conversation_id", "01890a5d-ac96-774b-bcce-b302099a8057"),
];

/// What makes a request a WebSocket handshake (the key is that of RFC 6455, section 1.3).
const HANDSHAKE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// A text frame as a client sends it, masked with zeros, as large as an event (RFC 6455, section 5.2).
static FRAME: [u8; EVENT_BYTES] = {
    let mut frame = [0; EVENT_BYTES];
    let payload = (EVENT_BYTES - 8) as u16;
    (frame[0], frame[1]) = (0x81, 0xfe);
    [frame[2], frame[3]] = payload.to_be_bytes();
    frame
};

/// Where requests go: a port, and for the upstream itself what makes a TLS connection; it wants the key, too.
#[derive(Clone)]
pub(crate) struct Target(pub(crate) u16, pub(crate) Option<TlsConnector>);

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A connection.
pub(crate) struct Client {
    sender: SendRequest<Parts>,
    is_direct: bool,
}

/// Connects to this.
async fn connect(Target(port, direct): &Target) -> Outcome<Box<dyn Stream>> {
    let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).await?;
    tcp.set_nodelay(true)?;
    Ok(match direct {
        None => Box::new(tcp),
        Some(tls) => Box::new(tls.connect(ServerName::try_from(HOST)?, tcp).await?),
    })
}

impl Client {
    async fn connect(target: &Target) -> Outcome<Self> {
        let stream = connect(target).await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let is_direct = target.1.is_some();
        Ok(Self { sender, is_direct })
    }

    /// Connects, sends a first request and waits for the head of its answer; anew where that takes longer
    /// than [`PATIENCE`]: OpenAI's proxy now and then leaves a connection unserved while others are busy.
    async fn open(target: &Target, task: &'static str) -> Outcome<(Self, Incoming)> {
        for _ in 0..ATTEMPTS {
            let first = async {
                let mut client = Self::connect(target).await?;
                let answer = client.send(task, Parts::small()).await?;
                Ok((client, answer.into_body()))
            };
            match timeout(PATIENCE, first).await {
                Ok(outcome) => return outcome,
                Err(_) => RETRIES.fetch_add(1, Ordering::Relaxed),
            };
        }
        Err("serves no connection".into())
    }

    /// A connection over which a request has been answered.
    pub(crate) async fn warm(target: &Target) -> Outcome<Self> {
        let (client, answer) = Self::open(target, ANSWER).await?;
        answer.collect().await?;
        Ok(client)
    }

    async fn send(&mut self, task: &'static str, body: Parts) -> Outcome<Response<Incoming>> {
        let mut request = Request::post("/v1/responses").body(body)?;
        let headers = request.headers_mut();
        for (name, value) in HEADERS {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert(TASK, HeaderValue::from_static(task));
        if self.is_direct {
            headers.insert("authorization", format!("Bearer {KEY}").try_into()?);
        }
        self.sender.ready().await?;
        let answer = self.sender.send_request(request).await?;
        match answer.status().as_u16() {
            200 => Ok(answer),
            status => Err(format!("answered {status}").into()),
        }
    }

    /// Sends a request and takes its answer; gives how long it took until the upstream had the first byte of
    /// the body, and until all was done.
    pub(crate) async fn exchange(&mut self, body: Parts) -> Outcome<(f64, f64)> {
        let sent = now();
        let answer = self.send(ANSWER, body).await?;
        let first = answer.headers().get(TASK).ok_or("a header is missing")?;
        let first: f64 = first.to_str()?.parse()?;
        answer.into_body().collect().await?;
        Ok((first - sent, now() - sent))
    }

    /// Sends a body of `length` bytes; gives how long it took.
    pub(crate) async fn upload(&mut self, length: u64) -> Outcome<f64> {
        let (sender, body) = Parts::new(Some(length));
        let block = Bytes::from_static(&[b'x'; BLOCK_BYTES as usize]);
        (0..length / BLOCK_BYTES).try_for_each(|_| sender.send(Some(block.clone())))?;
        Ok(self.exchange(body).await?.1)
    }

    /// Sends one byte of a body, another after `pause`; gives how long it took until the upstream had one.
    pub(crate) async fn slow_body(&mut self, pause: Duration) -> Outcome<f64> {
        let (sender, body) = Parts::new(Some(2));
        sender.send(Some(Bytes::from_static(b"x")))?;
        tokio::spawn(async move {
            sleep(pause).await;
            sender.send(Some(Bytes::from_static(b"x")))
        });
        Ok(self.exchange(body).await?.0)
    }
}

/// A WebSocket, over which frames are echoed.
pub(crate) struct WebSocket(Box<dyn Stream>);

impl WebSocket {
    /// Connects and makes the handshake.
    pub(crate) async fn open(target: &Target) -> Outcome<Self> {
        let mut stream = connect(target).await?;
        let mut request = "GET /v1/responses HTTP/1.1\r\n".to_owned();
        let key = target.1.is_some().then(|| format!("Bearer {KEY}"));
        let key = key.as_deref().map(|key| ("authorization", key));
        for (name, value) in HEADERS.into_iter().chain(HANDSHAKE).chain(key) {
            request += &format!("{name}: {value}\r\n");
        }
        stream.write_all((request + "\r\n").as_bytes()).await?;
        stream.flush().await?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await?);
        }
        match head.starts_with(b"HTTP/1.1 101 ") {
            true => Ok(Self(stream)),
            false => Err(format!("a handshake got {}", head.escape_ascii()).into()),
        }
    }

    /// Sends a frame and waits for its echo, again and again for `length`; gives how long each took.
    pub(crate) async fn round_trips(&mut self, length: Duration) -> Outcome<Vec<f64>> {
        let end = Instant::now() + length;
        let mut times = Vec::new();
        let mut echo = [0; EVENT_BYTES];
        while Instant::now() < end {
            let sent = now();
            self.0.write_all(&FRAME).await?;
            self.0.flush().await?;
            self.0.read_exact(&mut echo).await?;
            times.push(now() - sent);
        }
        Ok(times)
    }
}

/// Opens `count` WebSockets that fall silent, each once a frame has come back.
pub(crate) async fn open_websockets(target: &Target, count: usize) -> Outcome<Vec<WebSocket>> {
    let mut open = Vec::new();
    while open.len() < count {
        let mut websocket = WebSocket::open(target).await?;
        websocket.round_trips(Duration::from_nanos(1)).await?;
        open.push(websocket);
    }
    Ok(open)
}

/// Requests one after the other over each of `clients` for `length`; gives how long each took.
pub(crate) async fn requests(clients: Vec<Client>, length: Duration) -> Outcome<Vec<f64>> {
    let end = Instant::now() + length;
    let mut tasks = JoinSet::new();
    for mut client in clients {
        tasks.spawn(async move {
            let mut times = Vec::new();
            while Instant::now() < end {
                times.push(client.exchange(Parts::small()).await?.1);
            }
            Outcome::Ok(times)
        });
    }
    let times: Outcome<Vec<_>> = tasks.join_all().await.into_iter().collect();
    Ok(times?.concat())
}

/// Opens `count` streams that fall silent, each until its first events have come.
pub(crate) async fn hold(target: &Target, count: usize) -> Outcome<Vec<(Client, Incoming)>> {
    let turns = Arc::new(Semaphore::new(OPENED_AT_ONCE));
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let (target, turns) = (target.clone(), Arc::clone(&turns));
        tasks.spawn(async move {
            let _turn = turns.acquire().await?;
            let (client, mut events) = Client::open(&target, HOLD).await?;
            events.frame().await.ok_or("a stream ended")??;
            Outcome::Ok((client, events))
        });
    }
    tasks.join_all().await.into_iter().collect()
}

/// Of each event since this was last asked for, how long it took from the upstream.
pub(crate) fn take_delays() -> Vec<f64> {
    std::mem::take(&mut *DELAYS.lock().unwrap())
}

/// Follows `count` streams until the tasks are dropped; they end by an error alone. Gives them when each
/// stream has had an event, so that no connection is made while delays are measured.
pub(crate) async fn follow(target: &Target, count: usize) -> Outcome<JoinSet<Outcome<()>>> {
    let begun = Arc::new(Barrier::new(count + 1));
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let (target, mut begun) = (target.clone(), Some(Arc::clone(&begun)));
        tasks.spawn(async move {
            let (_client, mut events) = Client::open(&target, STREAM).await?;
            let mut data = Vec::new();
            while let Some(frame) = events.frame().await {
                let received = now();
                data.extend_from_slice(frame?.data_ref().ok_or("trailers")?);
                let whole = data.len() / EVENT_BYTES * EVENT_BYTES;
                for event in data.drain(..whole).as_slice().chunks(EVENT_BYTES) {
                    let sent = stamp(event).ok_or("an event without a stamp")?;
                    DELAYS.lock().unwrap().push(received - sent);
                }
                if let Some(begun) = begun.take() {
                    begun.wait().await;
                }
            }
            Err("a stream was broken off".into())
        });
    }
    tokio::select! {
        _ = begun.wait() => {}
        Some(ended) = tasks.join_next() => ended??,
    }
    Ok(tasks)
}
