//! One proxy under one steady load, for whoever looks at it with `perf`, `strace` or the like.

use std::error::Error;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use crate::load;
use crate::measure::{self, CpuTime, number, percentile};
use crate::peers;
use crate::round::{HELD_STREAMS, MEGABYTE, MICROSECOND, OPENED_AT_ONCE};
use crate::streams::{self, Delays};
use crate::upstream::Upstream;

/// How long the proxy waits for its load once its process id is told.
const HEAD_START: Duration = Duration::from_secs(2);

/// Gives the proxy `name` the load `kind` (`requests`, `one`, `events` or `streams`) for `length`, tells its
/// process id before, and how much it did after.
pub(crate) fn main(
    folder: &Path,
    name: &str,
    kind: &str,
    length: Duration,
) -> Result<(), Box<dyn Error>> {
    let _ = codex_responses_proxy::client::listener::connection_limit();
    let peers = peers::all(folder);
    let peer = peers.iter().find(|peer| peer.kind.name().contains(name));
    let peer = peer.ok_or("there is no such proxy here")?;
    let upstream = Upstream::start(folder)?;
    let running = peer.start(folder, &upstream)?;
    let (port, pid) = (running.port, running.pid());
    println!("pid {pid}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build_local(tokio::runtime::LocalOptions::default())?;
    runtime.block_on(async {
        load::one_by_one(port, 100, HEAD_START).await?;
        tokio::time::sleep(HEAD_START).await;
        let before = CpuTime::of(pid)?;
        let count = match kind {
            "requests" => load::at_once(port, 16, length).await?.0,
            "one" => load::one_by_one(port, usize::MAX >> 8, length).await?.len() as u64,
            "events" => {
                let delays = Rc::new(Delays::default());
                delays.recording.set(true);
                let streams = streams::follow(port, 64, &delays).await?;
                tokio::time::sleep(length).await;
                streams.iter().for_each(tokio::task::JoinHandle::abort);
                let mut delays = delays.delays.take();
                for share in [0.5, 0.9, 0.99, 0.999] {
                    let delay = percentile(&mut delays, share) / MICROSECOND;
                    println!("{:.1} % wait {delay:.0} µs at most", share * 100.0);
                }
                delays.len() as u64
            }
            "streams" => {
                let held = streams::hold(port, HELD_STREAMS, OPENED_AT_ONCE).await?;
                tokio::time::sleep(length).await;
                let memory = measure::memory(pid, measure::memory_is_exact(pid))?;
                println!("{:.1} MB", number(memory) / MEGABYTE);
                held.len() as u64
            }
            _ => return Err("the load is one of: requests, one, events, streams".into()),
        };
        let cpu = number(CpuTime::of(pid)?.since(&before));
        println!(
            "{count} {kind}, {:.1} µs of CPU each",
            cpu / MICROSECOND / number(count)
        );
        Ok(())
    })
}
