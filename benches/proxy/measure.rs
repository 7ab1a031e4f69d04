//! Readings of a process from /proc, and statistics.

use std::collections::BTreeMap;
use std::io;

/// Nanoseconds in a tick of /proc/PID/stat: USER_HZ is 100 on every Linux that Rust runs on.
const TICK_NANOSECONDS: u64 = 10_000_000;

/// How far the ticks of /proc/PID/stat may be ahead of the scheduler's figures by their coarseness.
const TICK_SLACK_NANOSECONDS: u64 = 4 * TICK_NANOSECONDS;

/// The CPU time that a process has used, user and system.
pub(crate) struct CpuTime {
    /// Of each living thread, exact.
    threads: BTreeMap<String, u64>,
    /// Of all threads that ever were, in ticks.
    whole: u64,
}

impl CpuTime {
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let mut threads = BTreeMap::new();
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            let task = task?;
            // A thread may end at any time.
            if let Ok(text) = std::fs::read_to_string(task.path().join("schedstat")) {
                let name = task.file_name().to_string_lossy().into_owned();
                threads.insert(name, first_number(&text));
            }
        }
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name in brackets may hold anything; utime and stime are fields 14 and 15 of proc(5).
        let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 = rest
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(first_number)
            .sum();
        Ok(Self {
            threads,
            whole: ticks * TICK_NANOSECONDS,
        })
    }

    /// The nanoseconds used since `earlier`. A process that makes a thread for each request is only
    /// seen whole in the coarse figure.
    pub(crate) fn since(&self, earlier: &Self) -> u64 {
        let before: u64 = self
            .threads
            .keys()
            .filter_map(|thread| earlier.threads.get(thread))
            .sum();
        let exact = self.threads.values().sum::<u64>() - before;
        let coarse = self.whole - earlier.whole;
        if coarse > exact + TICK_SLACK_NANOSECONDS {
            coarse
        } else {
            exact
        }
    }
}

fn first_number(text: &str) -> u64 {
    let number = text.split_whitespace().next().unwrap_or_default();
    number.parse().unwrap_or(0)
}

/// Whether the memory of processes like our own can be read as a share of what is shared (PSS).
///
/// This proxy lets only root look at it.
pub(crate) fn memory_is_exact(pid: u32) -> bool {
    std::fs::read(format!("/proc/{pid}/smaps_rollup")).is_ok()
}

/// A process's memory in bytes: PSS if `exact`, RSS otherwise.
pub(crate) fn memory(pid: u32, exact: bool) -> io::Result<u64> {
    let (file, field) = if exact {
        ("smaps_rollup", "Pss:")
    } else {
        ("status", "VmRSS:")
    };
    let text = std::fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    Ok(line.map_or(0, first_number) << 10)
}

/// The value below which `share` of `values` are; they get sorted.
pub(crate) fn percentile(values: &mut [u64], share: f64) -> f64 {
    values.sort_unstable();
    // Positions are far below where f64 gets coarse.
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    let position = (values.len().saturating_sub(1) as f64 * share).round() as usize;
    values
        .get(position)
        .map_or(f64::NAN, |&value| number(value))
}

/// The middle of `values`, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[half],
        _ => f64::midpoint(values[half - 1], values[half]),
    }
}

/// A count as a number to calculate with.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn number(count: u64) -> f64 {
    count as f64
}
