//! What is measured: each proxy alone for its memory, then all in turn, step by step.

use std::collections::BTreeMap;
use std::error::Error;
use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::load::{self, Client};
use crate::measure::{self, CpuTime, number, percentile};
use crate::peers::Peer;
use crate::process::Running;
use crate::streams::{self, Delays};
use crate::upstream::Upstream;

/// What was measured, by the names in [`crate::goals::MEASURES`].
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// How long a step may take that is not bounded by itself. Whoever takes longer hangs.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

/// Requests before any are measured.
const WARM_UP: usize = 100;

/// Requests on one connection, and how long they may take.
const ONE_BY_ONE: usize = 3_000;
const ONE_BY_ONE_BOUND: Duration = Duration::from_millis(400);

/// Connections at once, and for how long.
const CONNECTIONS: usize = 16;
const AT_ONCE: Duration = Duration::from_millis(800);

/// Streams that are followed; at [`crate::responder::EVENT_INTERVAL`] they are 3,200 events a second.
const STREAMS: usize = 64;

/// How long streams go on before they are measured, and for how long they are.
const STREAMS_WARM_UP: Duration = Duration::from_millis(200);
const STREAMS_MEASURED: Duration = Duration::from_millis(700);

/// A large body, in bytes.
const UPLOAD_BYTES: usize = 64 << 20;

/// Between the first byte of a slow body and the rest, and how many bodies are sent so.
const SLOW_BODY_PAUSE: Duration = Duration::from_millis(300);
const SLOW_BODIES: usize = 3;

/// Streams that are held open for their memory, and how many are opened at a time.
pub(crate) const HELD_STREAMS: usize = 1_000;
pub(crate) const OPENED_AT_ONCE: usize = 16;

pub(crate) const MICROSECOND: f64 = 1_000.0;
const MILLISECOND: f64 = 1_000_000.0;
pub(crate) const MEGABYTE: f64 = 1_000_000.0;

/// What is done with every proxy before the next is done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Step {
    OneConnection,
    Connections,
    SlowBodies,
    Upload,
    Events,
}

impl Step {
    pub(crate) const ALL: [Self; 5] = [
        Self::OneConnection,
        Self::Connections,
        Self::SlowBodies,
        Self::Upload,
        Self::Events,
    ];

    /// Does it with one proxy.
    pub(crate) fn measure(
        self,
        running: &Running,
        figures: &mut Figures,
    ) -> Result<(), Box<dyn Error>> {
        let (port, pid) = (running.port, running.pid());
        block_on(async {
            match self {
                Self::OneConnection => one_connection(port, pid, figures).await,
                Self::Connections => connections(port, pid, figures).await,
                Self::SlowBodies => {
                    let mut seen = bounded(slow_bodies(port)).await?;
                    figures.insert("first_byte", percentile(&mut seen, 0.5) / MILLISECOND);
                    Ok(())
                }
                Self::Upload => upload(port, pid, figures).await,
                Self::Events => events(port, pid, figures).await,
            }
        })
    }
}

/// What a proxy needs, with no other running that would share memory with it.
pub(crate) fn alone(
    peer: &Peer,
    folder: &Path,
    upstream: &Upstream,
) -> Result<Figures, Box<dyn Error>> {
    let running = peer.start(folder, upstream)?;
    let (port, pid) = (running.port, running.pid());
    let exact = measure::memory_is_exact(pid);
    let start_time = number(u64::try_from(running.start_time.as_nanos())?);
    let megabytes = || measure::memory(pid, exact).map(|bytes| number(bytes) / MEGABYTE);
    block_on(async {
        bounded(load::one_by_one(port, 1, STEP_TIMEOUT)).await?;
        let idle = megabytes()?;
        let held = bounded(streams::hold(port, HELD_STREAMS, OPENED_AT_ONCE)).await?;
        let streams = megabytes()?;
        drop(held);
        Ok(Figures::from([
            ("start", start_time / MILLISECOND),
            ("size", number(peer.size()) / MEGABYTE),
            ("memory_idle", idle),
            ("memory_streams", streams),
        ]))
    })
}

fn block_on<T>(load: impl Future<Output = Result<T, Box<dyn Error>>>) -> Result<T, Box<dyn Error>> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())?
        .block_on(load)
}

async fn one_connection(port: u16, pid: u32, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    bounded(load::one_by_one(port, WARM_UP, ONE_BY_ONE_BOUND)).await?;
    let before = CpuTime::of(pid)?;
    let mut times = bounded(load::one_by_one(port, ONE_BY_ONE, ONE_BY_ONE_BOUND)).await?;
    let cpu = number(CpuTime::of(pid)?.since(&before)) / MICROSECOND;
    figures.insert("cpu_request_one", cpu / number(times.len() as u64));
    figures.insert("latency_p50", percentile(&mut times, 0.5) / MICROSECOND);
    figures.insert("latency_p99", percentile(&mut times, 0.99) / MICROSECOND);
    Ok(())
}

async fn connections(port: u16, pid: u32, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let before = CpuTime::of(pid)?;
    let (count, time) = bounded(load::at_once(port, CONNECTIONS, AT_ONCE)).await?;
    let cpu = number(CpuTime::of(pid)?.since(&before)) / MICROSECOND;
    figures.insert("cpu_request", cpu / number(count));
    figures.insert("requests_per_second", number(count) / time.as_secs_f64());
    Ok(())
}

async fn upload(port: u16, pid: u32, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let mut client = bounded(Client::warm(port)).await?;
    let before = CpuTime::of(pid)?;
    let begin = Instant::now();
    bounded(client.upload(UPLOAD_BYTES)).await?;
    let megabytes = number(UPLOAD_BYTES as u64) / MEGABYTE;
    figures.insert("upload", megabytes / begin.elapsed().as_secs_f64());
    let cpu = number(CpuTime::of(pid)?.since(&before)) / MICROSECOND;
    figures.insert("cpu_upload", cpu / megabytes);
    Ok(())
}

/// Nothing here takes longer than [`STEP_TIMEOUT`], whatever the proxy does.
async fn bounded<T>(step: impl Future<Output = std::io::Result<T>>) -> Result<T, Box<dyn Error>> {
    match tokio::time::timeout(STEP_TIMEOUT, step).await {
        Ok(outcome) => Ok(outcome?),
        Err(_) => Err(format!("hung for {} s", STEP_TIMEOUT.as_secs()).into()),
    }
}

/// Several slow bodies, a little after each other.
async fn slow_bodies(port: u16) -> std::io::Result<Vec<u64>> {
    let mut tasks = Vec::new();
    for _ in 0..SLOW_BODIES {
        tasks.push(tokio::task::spawn_local(async move {
            // Over a connection that is in use, as between Codex's turns.
            let mut client = Client::warm(port).await?;
            client.slow_body(SLOW_BODY_PAUSE).await
        }));
        tokio::time::sleep(SLOW_BODY_PAUSE / 10).await;
    }
    let mut seen = Vec::new();
    for task in tasks {
        seen.push(task.await.map_err(std::io::Error::other)??);
    }
    Ok(seen)
}

async fn events(port: u16, pid: u32, figures: &mut Figures) -> Result<(), Box<dyn Error>> {
    let delays = Rc::new(Delays::default());
    let streams = bounded(streams::follow(port, STREAMS, &delays)).await?;
    tokio::time::sleep(STREAMS_WARM_UP).await;
    let before = CpuTime::of(pid)?;
    delays.recording.set(true);
    tokio::time::sleep(STREAMS_MEASURED).await;
    delays.recording.set(false);
    let cpu = number(CpuTime::of(pid)?.since(&before));
    for stream in streams {
        stream.abort();
        // Aborted is what it should be; a stream that ended by itself is an error.
        if let Ok(ended) = stream.await {
            ended?;
        }
    }
    let mut delays = delays.delays.take();
    if delays.is_empty() {
        return Err("no event came".into());
    }
    figures.insert("cpu_event", cpu / MICROSECOND / number(delays.len() as u64));
    figures.insert("delay_p50", percentile(&mut delays, 0.5) / MICROSECOND);
    figures.insert("delay_p99", percentile(&mut delays, 0.99) / MICROSECOND);
    Ok(())
}
