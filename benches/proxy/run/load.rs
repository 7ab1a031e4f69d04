//! The load: requests like Codex's, sent by hyper's client, and WebSockets.

use std::net::Ipv4Addr;
use std::sync::Mutex;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::upgrade::Upgraded;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::Result;
use super::upstream::{EVENT_BYTES, RESPOND, SMALL, STREAM, TASK, TIMESTAMP, TUNNEL, Task, now};

/// Time limit for the first response on a connection.
const FIRST_RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Limits the number of connections opened concurrently, so that no backlog overflows.
static CONNECTS: Semaphore = Semaphore::const_new(16);

/// Headers of a request, as many and as long as Codex's.
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

/// Additional headers of a WebSocket handshake; the key is that of RFC 6455, section 1.3.
const HANDSHAKE: [(&str, &str); 4] = [
    ("connection", "Upgrade"),
    ("upgrade", "websocket"),
    ("sec-websocket-version", "13"),
    ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
];

/// In microseconds, what the current step measures: response times, round-trip times or event delays.
pub(crate) static TIMES: Mutex<Vec<f64>> = Mutex::new(Vec::new());

type Sender = SendRequest<Full<Bytes>>;

async fn send(sender: &mut Sender, task: Task, body: &'static [u8]) -> Result<Response<Incoming>> {
    let handshake = if task == TUNNEL { &HANDSHAKE[..] } else { &[] };
    let method = if task == TUNNEL { "GET" } else { "POST" };
    let mut request = Request::builder().method(method).uri("/v1/responses");
    for (name, value) in HEADERS.iter().chain(handshake).chain([&(TASK, task)]) {
        request = request.header(*name, *value);
    }
    sender.ready().await?;
    let response = sender.send_request(request.body(Full::from(body))?).await?;
    match response.status().as_u16() {
        101 | 200 => Ok(response),
        status => Err(format!("status {status}").into()),
    }
}

/// Connects and sends a first request. Reconnects after a timeout: OpenAI's proxy occasionally does not serve
/// a connection while others are busy.
async fn open(port: u16, task: Task) -> Result<(Sender, Response<Incoming>)> {
    let _permit = CONNECTS.acquire().await?;
    loop {
        let first = async {
            let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
            tcp.set_nodelay(true)?;
            let (mut sender, connection) = handshake(TokioIo::new(tcp)).await?;
            tokio::spawn(connection.with_upgrades());
            let body = if task == TUNNEL { &[] } else { &SMALL[..] };
            let response = send(&mut sender, task, body).await?;
            Ok((sender, response))
        };
        match timeout(FIRST_RESPONSE_TIMEOUT, first).await {
            Ok(result) => return result,
            Err(_) => eprintln!("no response within {FIRST_RESPONSE_TIMEOUT:?}: reconnecting"),
        }
    }
}

/// A connection on which a first request has been served.
pub(crate) enum Connection {
    Http(Sender),
    WebSocket(TokioIo<Upgraded>),
}

impl Connection {
    /// Sends a request and reads its response, or sends a frame and reads its echo; records the time.
    async fn exchange(&mut self, message: &'static [u8]) -> Result<()> {
        let sent = now();
        match self {
            Self::Http(sender) => {
                let response = send(sender, RESPOND, message).await?;
                response.into_body().collect().await?;
            }
            Self::WebSocket(stream) => {
                stream.write_all(message).await?;
                stream.flush().await?;
                stream.read_exact(&mut vec![0; message.len()]).await?;
            }
        }
        TIMES.lock().unwrap().push(now() - sent);
        Ok(())
    }
}

/// Opens connections for requests ([`RESPOND`]) or frames ([`TUNNEL`]).
pub(crate) async fn connect(port: u16, count: usize, task: Task) -> Result<Vec<Connection>> {
    let opened: JoinSet<_> = (0..count).map(|_| open(port, task)).collect();
    let mut connections = Vec::new();
    for opened in opened.join_all().await {
        let (sender, response) = opened?;
        connections.push(if task == TUNNEL {
            Connection::WebSocket(TokioIo::new(hyper::upgrade::on(response).await?))
        } else {
            response.into_body().collect().await?;
            Connection::Http(sender)
        });
    }
    Ok(connections)
}

/// Sends `message` over each connection, again after each response, for `duration` and at least once.
pub(crate) async fn exchange(
    connections: Vec<Connection>,
    message: &'static [u8],
    duration: Duration,
) -> Result<Vec<Connection>> {
    let end = Instant::now() + duration;
    let repeat = |mut connection: Connection| async move {
        loop {
            connection.exchange(message).await?;
            if Instant::now() >= end {
                return Ok(connection);
            }
        }
    };
    let tasks: JoinSet<_> = connections.into_iter().map(repeat).collect();
    tasks.join_all().await.into_iter().collect()
}

/// Opens streams and records the delay of each event until the tasks are dropped. A task ends only with an
/// error.
pub(crate) async fn stream(port: u16, count: usize) -> Result<JoinSet<Result<()>>> {
    let opened: JoinSet<_> = (0..count).map(|_| open(port, STREAM)).collect();
    let mut tasks = JoinSet::new();
    for opened in opened.join_all().await {
        tasks.spawn(read_events(opened?));
    }
    Ok(tasks)
}

async fn read_events((_sender, response): (Sender, Response<Incoming>)) -> Result<()> {
    let mut body = response.into_body();
    let mut data = Vec::new();
    while let Some(frame) = body.frame().await {
        data.extend_from_slice(frame?.data_ref().ok_or("trailers")?);
        let complete = data.len() / EVENT_BYTES * EVENT_BYTES;
        for event in data.drain(..complete).as_slice().chunks(EVENT_BYTES) {
            let sent: f64 = std::str::from_utf8(&event[TIMESTAMP])?.parse()?;
            TIMES.lock().unwrap().push(now() - sent);
        }
    }
    Err("a stream ended".into())
}
