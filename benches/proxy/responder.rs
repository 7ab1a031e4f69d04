//! What the stand-in upstream does: speaks TLS and answers as it is told.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_rustls::TlsAcceptor;

use crate::wire::{self, BODY_BYTES, KEY, TASK_HEADER, Task};

/// How long between two events of one stream: the pace of a model that says fifty words a second.
pub(crate) const EVENT_INTERVAL: Duration = Duration::from_millis(20);

/// How many events a stream begins with that is then silent: more than the 8 KiB that OpenAI's proxy
/// waits for before it lets anything go.
const HELD_EVENTS: usize = 40;

/// How long the pacer waits for a first stream.
const EMPTY_PAUSE: Duration = Duration::from_millis(1);

/// What is read from a socket at once. rustls itself would ask for 4 KiB at a time, which would make
/// uploads this program's limit and not the proxy's.
const READ_BYTES: usize = 64 << 10;

/// What the upstream answers a small request, in headers about what the real one sends.
const ANSWER_HEADERS: &str = "date: Sun, 01 Feb 2026 00:00:00 GMT\r\n\
     x-request-id: req_0123456789abcdef0123456789abcdef\r\n\
     openai-organization: org-0123456789\r\n\
     openai-processing-ms: 123\r\n\
     openai-version: 2020-10-01\r\n\
     x-ratelimit-limit-requests: 10000\r\n\
     x-ratelimit-remaining-requests: 9999\r\n\
     strict-transport-security: max-age=31536000; includeSubDomains; preload\r\n\
     server: bench\r\n";

/// The process itself: tells its port on stdout, and serves until stdin ends.
pub(crate) fn main(folder: &Path) -> Result<(), Box<dyn Error>> {
    let certificates = vec![CertificateDer::from_pem_file(folder.join("upstream.pem"))?];
    let key = PrivateKeyDer::from_pem_file(folder.join("upstream.key"))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificates, key)?;
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let pacer = Pacer::start();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
        let mut output = std::io::stdout();
        output.write_all(&listener.local_addr()?.port().to_be_bytes())?;
        output.flush()?;
        loop {
            let (tcp, _) = listener.accept().await?;
            tcp.set_nodelay(true)?;
            let tcp = BufReader::with_capacity(READ_BYTES, tcp);
            let (pacer, acceptor) = (Arc::clone(&pacer), acceptor.clone());
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(tcp).await {
                    let _ = serve(stream, &pacer).await;
                }
            });
        }
    })
}

/// Streams that wait for their turn to send an event.
#[derive(Default)]
struct Turns(Mutex<Vec<Arc<Notify>>>);

impl Turns {
    fn all(&self) -> MutexGuard<'_, Vec<Arc<Notify>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells streams when to send: threads of their own, as the event loop's timers are no finer than a
/// millisecond.
#[derive(Default)]
struct Pacer {
    /// These send one after the other and evenly spread, so that each event goes alone.
    paced: Turns,
    /// These send one event for each byte that comes on stdin.
    stepped: Turns,
}

impl Pacer {
    /// Starts the threads. When stdin ends, so does the process.
    fn start() -> Arc<Self> {
        let pacer = Arc::new(Self::default());
        let worker = Arc::clone(&pacer);
        std::thread::spawn(move || worker.pace());
        let worker = Arc::clone(&pacer);
        std::thread::spawn(move || {
            let mut step = [0];
            while std::io::stdin().read_exact(&mut step).is_ok() {
                worker
                    .stepped
                    .all()
                    .iter()
                    .for_each(|turn| turn.notify_one());
            }
            std::process::exit(0);
        });
        pacer
    }

    fn pace(&self) {
        let mut next = Instant::now();
        loop {
            let turns = self.paced.all().clone();
            let gap = EVENT_INTERVAL / u32::try_from(turns.len()).unwrap_or(u32::MAX).max(1);
            for turn in &turns {
                next += gap;
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
                turn.notify_one();
            }
            if turns.is_empty() {
                std::thread::sleep(EMPTY_PAUSE);
            }
            // What was missed is not made up for: that would be a burst.
            next = next.max(Instant::now());
        }
    }

    fn turns(&self, task: Task) -> Option<&Turns> {
        match task {
            Task::Stream => Some(&self.paced),
            Task::Step => Some(&self.stepped),
            Task::Hold | Task::Answer => None,
        }
    }
}

/// Serves one connection until the proxy closes it.
async fn serve<S>(mut stream: S, pacer: &Pacer) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let bearer = format!("Bearer {KEY}");
    let mut input = vec![0; READ_BYTES];
    loop {
        let mut filled = 0;
        let end = loop {
            if let Some(end) = wire::head_end(&input[..filled]) {
                break end;
            }
            match stream.read(&mut input[filled..]).await? {
                0 => return Ok(()),
                count => filled += count,
            }
        };
        let head = &input[..end];
        let task = wire::header(head, TASK_HEADER).and_then(Task::parse);
        let authorized = wire::header(head, "authorization") == Some(bearer.as_bytes());
        let (Some(task), Some(length), true) = (task, wire::content_length(head), authorized)
        else {
            let refusal = b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n";
            stream.write_all(refusal).await?;
            return stream.flush().await;
        };
        let mut first = wire::now();
        let mut taken = filled - end;
        while taken < length {
            let before = taken;
            match stream.read(&mut input).await? {
                0 => return Ok(()),
                count => taken += count,
            }
            if before == 0 {
                first = wire::now();
            }
        }
        if task == Task::Answer {
            stream.write_all(&answer(first)).await?;
            stream.flush().await?;
        } else {
            return events(stream, task, pacer).await;
        }
    }
}

fn answer(first: u64) -> Vec<u8> {
    let mut answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{ANSWER_HEADERS}content-length: {BODY_BYTES}\r\n\r\n{first:019}"
    )
    .into_bytes();
    answer.resize(answer.len() + BODY_BYTES - wire::STAMP_DIGITS, b'x');
    answer
}

/// Sends events until the other side is gone. Each is a write, and so a TLS record, of its own.
async fn events<S>(mut stream: S, task: Task, pacer: &Pacer) -> std::io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n{ANSWER_HEADERS}transfer-encoding: chunked\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.flush().await?;
    let turn = Arc::new(Notify::new());
    match pacer.turns(task) {
        Some(turns) => turns.all().push(Arc::clone(&turn)),
        None => {
            for _ in 0..HELD_EVENTS {
                event(&mut stream).await?;
            }
        }
    }
    let mut rest = [0; 64];
    let outcome = loop {
        tokio::select! {
            () = turn.notified() => if let Err(error) = event(&mut stream).await {
                break Err(error);
            },
            read = stream.read(&mut rest) => match read {
                Ok(0) => break Ok(()),
                Ok(_) => {}
                Err(error) => break Err(error),
            }
        }
    };
    if let Some(turns) = pacer.turns(task) {
        turns.all().retain(|other| !Arc::ptr_eq(other, &turn));
    }
    outcome
}

async fn event<S: AsyncWrite + Unpin>(stream: &mut S) -> std::io::Result<()> {
    let mut chunk = format!("{:x}\r\n", wire::EVENT_BYTES).into_bytes();
    chunk.extend_from_slice(&wire::event());
    chunk.extend_from_slice(b"\r\n");
    stream.write_all(&chunk).await?;
    stream.flush().await
}
