//! Logging to stderr; never request content.

use std::io::{Write, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{error::Error, fmt, os::fd::AsFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The longest line, in bytes: so much a pipe that says it can be written to takes without blocking
/// (`PIPE_BUF`, pipe(7)).
const MAX_LINE: usize = 4096;

/// How many lines stderr has not taken since the last one that it took.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Logs one line, formatted as by [`format!`].
macro_rules! log {
    ($($arguments:tt)*) => {
        $crate::log::line(format_args!($($arguments)*))
    };
}

/// Writes one line in one write(2), so that lines never mix.
///
/// A stderr that nobody reads loses the line and holds nobody up: it is asked first whether it can take
/// one. (Not made non-blocking: that would be so for whoever else has it, the shell among them.) The
/// next line that it takes says how many were lost.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    let mut line = Vec::with_capacity(128);
    let lost = LOST.load(Ordering::Relaxed);
    let _ = match lost {
        0 => write!(line, "{text}"),
        _ => write!(line, "{text} (after {lost} lines that stderr did not take)"),
    };
    line.truncate(MAX_LINE - 1);
    line.push(b'\n');
    let stderr = stderr();
    let mut state = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let is_ready = poll(&mut state, PollTimeout::ZERO).is_ok_and(|count| count > 0);
    if is_ready && stderr.lock().write(&line).is_ok() {
        LOST.fetch_sub(lost, Ordering::Relaxed);
    } else {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

/// Notifies systemd, if it started the program (sd_notify(3)). If that fails, the unit times out, and the
/// log says why.
pub(crate) fn notify_systemd(state: &sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        line(format_args!("cannot notify systemd: {error}"));
    }
}

/// Logs a request that is not forwarded.
pub(crate) fn rejection(uid: Option<u32>, status: u16, reason: &str) {
    let uid = self::uid(uid);
    log!("refused uid={uid} status={status} reason={reason:?}");
}

/// A uid in a log line, or `-` if it is unknown.
pub(crate) fn uid(uid: Option<u32>) -> String {
    uid.map_or("-".into(), |uid| uid.to_string())
}

/// An error and its causes, down to the system's own words.
pub(crate) fn with_sources(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}
