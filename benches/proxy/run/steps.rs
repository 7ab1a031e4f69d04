//! What is measured, and how.

use std::time::Duration;

use clap::ValueEnum;
use tokio::time::sleep;

use super::Outcome;
use super::load::{Client, WebSocket, follow, hold, open_websockets, requests, take_delays};
use super::peers::{Kind, Peer, Running};
use super::report::quantile;

/// Rows of the table, and what was measured for them.
pub(crate) type Figures = Vec<(&'static str, f64)>;

/// How long requests are sent, and over how many connections at once.
const REQUESTS: Duration = Duration::from_millis(600);
const CONNECTIONS: usize = 16;

/// Streams that are followed, how long before they are measured, and for how long they are.
const STREAMS: usize = 64;
const STREAMS_WARM_UP: Duration = Duration::from_millis(200);
const STREAMS_MEASURED: Duration = Duration::from_millis(700);

/// A large body.
const UPLOAD_BYTES: u64 = 64 << 20;

/// Between the first byte of a slow body and the second.
const SLOW_PAUSE: Duration = Duration::from_millis(300);

/// Streams and WebSockets that are held open for their memory.
const HELD_STREAMS: usize = 1_000;
const HELD_WEBSOCKETS: usize = 1_000;

/// Until memory is read, for what was just done to be done with.
const SETTLING: Duration = Duration::from_millis(100);

/// What is done with every peer before the next is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Step {
    /// Small requests over 16 connections at once
    Many,
    /// Small requests over one connection
    One,
    /// 64 streams of events
    Events,
    /// One large body
    Upload,
    /// A body whose first byte comes 300 ms before the rest
    SlowBody,
    /// Frames of a WebSocket, each echoed before the next
    Frames,
    /// Start and memory, with no other proxy running
    Alone,
    /// Memory of open WebSockets, with no other proxy running
    Websockets,
}

impl Step {
    /// Whether a peer is started for it while no other runs.
    pub(crate) fn is_alone(self) -> bool {
        matches!(self, Self::Alone | Self::Websockets)
    }

    /// Does it with one peer; gives what stands in the table, NaN where it can't be told.
    pub(crate) async fn measure(self, peer: &Peer, to: &Running) -> Outcome<Figures> {
        let mut client = Client::warm(&to.target).await?;
        Ok(match self {
            Self::Many => {
                let mut clients = vec![client];
                while clients.len() < CONNECTIONS {
                    clients.push(Client::warm(&to.target).await?);
                }
                let (cpu, times) = cpu_of(to, requests(clients, REQUESTS)).await?;
                let count = times.len() as f64;
                let rate = count / REQUESTS.as_secs_f64();
                vec![
                    ("CPU per request, 16 connections, µs", cpu / count),
                    ("requests, 16 connections, 1/s", rate),
                ]
            }
            Self::One => {
                let (cpu, times) = cpu_of(to, requests(vec![client], REQUESTS)).await?;
                let count = times.len() as f64;
                vec![
                    ("CPU per request, one connection, µs", cpu / count),
                    ("latency of a request, p50, µs", quantile(&times, 0.5)),
                    ("latency of a request, p99, µs", quantile(&times, 0.99)),
                ]
            }
            Self::Events => {
                let mut streams = follow(&to.target, STREAMS).await?;
                sleep(STREAMS_WARM_UP).await;
                take_delays();
                let delays = async {
                    sleep(STREAMS_MEASURED).await;
                    Ok(take_delays())
                };
                let (cpu, delays) = cpu_of(to, delays).await?;
                if let Some(ended) = streams.try_join_next() {
                    ended??;
                }
                vec![
                    ("CPU per event of a stream, µs", cpu / delays.len() as f64),
                    ("delay of an event, p50, µs", quantile(&delays, 0.5)),
                    ("delay of an event, p99, µs", quantile(&delays, 0.99)),
                ]
            }
            Self::Upload => {
                let (cpu, time) = cpu_of(to, client.upload(UPLOAD_BYTES)).await?;
                let megabytes = UPLOAD_BYTES as f64 / 1e6;
                vec![
                    ("upload, 64 MiB body, MB/s", megabytes / time * 1e6),
                    ("CPU per MB of upload, µs", cpu / megabytes),
                ]
            }
            Self::SlowBody => {
                let time = client.slow_body(SLOW_PAUSE).await? / 1e3;
                vec![("upstream sees a slow body's first byte, ms", time)]
            }
            Self::Frames | Self::Websockets if peer.kind == Kind::Codex => Vec::new(),
            Self::Frames => {
                let mut websocket = WebSocket::open(&to.target).await?;
                let (cpu, times) = cpu_of(to, websocket.round_trips(REQUESTS)).await?;
                // There and back.
                let frames = 2.0 * times.len() as f64;
                vec![
                    (
                        "round trip of a WebSocket frame, p50, µs",
                        quantile(&times, 0.5),
                    ),
                    ("CPU per WebSocket frame, µs", cpu / frames),
                ]
            }
            Self::Alone | Self::Websockets if peer.kind == Kind::Direct => Vec::new(),
            Self::Websockets => {
                drop(client);
                let _open = open_websockets(&to.target, HELD_WEBSOCKETS).await?;
                vec![("memory, 1,000 WebSockets open, MB", memory(to).await)]
            }
            Self::Alone => {
                drop(client);
                let idle = memory(to).await;
                let _held = hold(&to.target, HELD_STREAMS).await?;
                vec![
                    ("memory, idle, MB", idle),
                    ("memory, 1,000 streams open, MB", memory(to).await),
                    ("from key to listening, ms", to.start_time),
                    ("binary size, MB", peer.size()),
                ]
            }
        })
    }
}

/// The CPU time that the proxy uses for something, and what comes of it.
async fn cpu_of<T>(to: &Running, load: impl Future<Output = Outcome<T>>) -> Outcome<(f64, T)> {
    let before = to.cpu()?;
    let done = load.await?;
    Ok((to.cpu()? - before, done))
}

/// NaN where it may not be read: of a process that is not dumpable, by root alone.
async fn memory(to: &Running) -> f64 {
    sleep(SETTLING).await;
    to.memory().unwrap_or(f64::NAN)
}
