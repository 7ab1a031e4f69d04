//! What is measured, and under which load.

use std::time::Duration;

use clap::ValueEnum;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::Result;
use super::load::{TIMES, connect, exchange, stream};
use super::proxies::{Kind, Running};
use super::report::quantile;
use super::upstream::{EVENT_BYTES, RESPOND, SMALL, TUNNEL, send_events};

/// Connections that are busy at once.
const CONNECTIONS: usize = 16;

/// Streams with events.
const STREAMS: usize = 64;

/// Duration of a load before the measurement and during it. The warm-up is long enough for a proxy to open the
/// upstream connections of a burst, and for OpenAI's proxy to fill its buffer and forward it.
const WARM_UP: Duration = Duration::from_millis(500);
const MEASURED: Duration = Duration::from_millis(700);

/// Requests of a burst, and the number of bursts measured.
const BURST_REQUESTS: usize = 200;
const BURSTS: usize = 8;

/// The body of an upload.
static UPLOAD: [u8; 64 << 20] = [0; 64 << 20];

/// A WebSocket frame; no proxy parses it.
static FRAME: [u8; EVENT_BYTES] = [b'x'; EVENT_BYTES];

/// Streams or WebSockets that are open while memory is read.
const HELD: usize = 1_000;

/// Delay before memory is read, for pending work to complete.
const SETTLING: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Step {
    /// Small requests over 16 connections
    Requests,
    /// 200 small requests at once, over 200 connections
    Burst,
    /// 64 streams with 50 events a second each
    Events,
    /// Echoed frames over 16 WebSockets
    Frames,
    /// One request with a body of 64 MiB
    Upload,
    /// Memory, idle and with 1,000 streams
    Streams,
    /// Memory with 1,000 WebSockets
    Tunnels,
}

impl Step {
    /// Whether OpenAI's proxy, which does not support WebSockets, can run the step.
    pub(crate) fn applies_to(self, kind: Kind) -> bool {
        kind != Kind::Codex || !matches!(self, Self::Frames | Self::Tunnels)
    }

    pub(crate) fn is_memory(self) -> bool {
        matches!(self, Self::Streams | Self::Tunnels)
    }

    /// Runs the step with one proxy; passes the table's rows and the values measured for them to `add`.
    pub(crate) async fn run(
        self,
        proxy: &Running,
        mut add: impl FnMut(&'static str, f64),
    ) -> Result<()> {
        let port = proxy.port;
        match self {
            Self::Requests => {
                let connections = connect(port, CONNECTIONS, RESPOND).await?;
                let connections = exchange(connections, &SMALL, WARM_UP).await?;
                let load = exchange(connections, &SMALL, MEASURED);
                let [cpu, count, p50, p99] = observe(proxy, load).await?;
                add("CPU per request, µs", cpu / count);
                add("requests per second", count / MEASURED.as_secs_f64());
                add("request latency, p50, µs", p50);
                add("request latency, p99, µs", p99);
            }
            Self::Burst => {
                let mut connections = connect(port, BURST_REQUESTS, RESPOND).await?;
                connections = exchange(connections, &SMALL, WARM_UP).await?;
                let load = async {
                    for _ in 0..BURSTS {
                        connections = exchange(connections, &SMALL, Duration::ZERO).await?;
                    }
                    Ok(connections)
                };
                let [cpu, count, p50, p99] = observe(proxy, load).await?;
                add("CPU per request, burst of 200, µs", cpu / count);
                add("request latency, burst of 200, p50, µs", p50);
                add("request latency, burst of 200, p99, µs", p99);
            }
            Self::Events => {
                let mut streams = stream(port, STREAMS).await?;
                spawn_blocking(|| send_events(WARM_UP)).await?;
                let load = async { Ok(spawn_blocking(|| send_events(MEASURED)).await?) };
                let [cpu, count, p50, p99] = observe(proxy, load).await?;
                if let Some(ended) = streams.try_join_next() {
                    ended??;
                }
                add("CPU per event, µs", cpu / count);
                add("event delay, p50, µs", p50);
                add("event delay, p99, µs", p99);
            }
            Self::Frames => {
                let websockets = connect(port, CONNECTIONS, TUNNEL).await?;
                let websockets = exchange(websockets, &FRAME, WARM_UP).await?;
                let load = exchange(websockets, &FRAME, MEASURED);
                let [cpu, count, p50, _] = observe(proxy, load).await?;
                // An exchange is two frames.
                add("CPU per WebSocket frame, µs", cpu / (2.0 * count));
                add("WebSocket round trip, p50, µs", p50);
            }
            Self::Upload => {
                let connection = connect(port, 1, RESPOND).await?;
                let load = exchange(connection, &UPLOAD, Duration::ZERO);
                let [cpu, _, time, _] = observe(proxy, load).await?;
                // Bytes per microsecond are MB/s.
                let bytes = UPLOAD.len() as f64;
                add("upload, MB/s", bytes / time);
                add("CPU per uploaded MB, µs", cpu / bytes * 1e6);
            }
            Self::Streams => {
                connect(port, 1, RESPOND).await?;
                add("memory, idle, MB", memory(proxy).await);
                let _streams = stream(port, HELD).await?;
                add("memory, 1,000 streams, MB", memory(proxy).await);
            }
            Self::Tunnels => {
                let websockets = connect(port, HELD, TUNNEL).await?;
                let _websockets = exchange(websockets, &FRAME, Duration::ZERO).await?;
                add("memory, 1,000 WebSockets, MB", memory(proxy).await);
            }
        }
        Ok(())
    }
}

/// The CPU time that the proxy uses during `load`, in microseconds, and of the times recorded their number, the
/// median and the 99th percentile.
async fn observe<T>(proxy: &Running, load: impl Future<Output = Result<T>>) -> Result<[f64; 4]> {
    TIMES.lock().unwrap().clear();
    let before = proxy.cpu()?;
    load.await?;
    let cpu = proxy.cpu()? - before;
    let times = TIMES.lock().unwrap().clone();
    let [p50, p99] = [0.5, 0.99].map(|share| quantile(&times, share));
    Ok([cpu, times.len() as f64, p50, p99])
}

/// NaN without permission: only root may read the memory of a process that is not dumpable.
async fn memory(proxy: &Running) -> f64 {
    sleep(SETTLING).await;
    proxy.memory().unwrap_or(f64::NAN)
}
