//! Logging to stderr; never request content.

use std::io::{Write, stderr};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::{borrow::Cow, cell::RefCell, error::Error, fmt, os::fd::AsFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// The most written at once, in bytes: a pipe that is ready takes that much without blocking (`PIPE_BUF`,
/// pipe(7)).
const MAX_WRITE: usize = 4096;

/// The most lines written at once, in bytes. The number of lost lines needs the rest.
const MAX_LINES: usize = MAX_WRITE - 64;

/// How many lines stderr has not taken since the last that it took.
static LOST: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Lines that wait for [`flush`]; `None` where each line is written at once.
    static BUFFER: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Logs one line, formatted as by [`format!`].
macro_rules! log {
    ($($arguments:tt)*) => {
        $crate::log::line(format_args!($($arguments)*))
    };
}

/// Lets this thread's lines wait for [`flush`], to be called before it sleeps, or no longer: one write for
/// all lines of a turn of the event loop costs less than one for each.
pub(crate) fn set_buffering(is_buffering: bool) {
    flush();
    BUFFER.set(is_buffering.then(|| Vec::with_capacity(MAX_WRITE)));
}

/// Writes this thread's lines.
pub(crate) fn flush() {
    BUFFER.with_borrow_mut(|buffer| buffer.iter_mut().for_each(write));
}

/// Logs one line. Lines are written whole, so that they never mix.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    BUFFER.with_borrow_mut(|buffer| {
        let mut unbuffered = Vec::new();
        let lines = buffer.as_mut().unwrap_or(&mut unbuffered);
        let start = lines.len();
        let _ = lines.write_fmt(text);
        lines.truncate(start + MAX_LINES - 1);
        lines.push(b'\n');
        if lines.len() > MAX_LINES {
            let last = lines.split_off(start);
            write(lines);
            lines.extend(last);
        }
        write(&mut unbuffered);
    });
}

/// Writes whole lines in one write(2) and clears them.
///
/// If nobody reads stderr, they are lost rather than waited for: poll(2) tells whether stderr takes them. (It
/// is not made non-blocking, which would affect every process that shares it, such as the shell.) The next
/// write that succeeds reports how many were lost.
fn write(lines: &mut Vec<u8>) {
    let Some(first) = lines.iter().position(|&byte| byte == b'\n') else {
        return;
    };
    let count = lines.iter().filter(|&&byte| byte == b'\n').count();
    let lost = LOST.swap(0, Relaxed);
    if lost > 0 {
        let note = format!(" (after {lost} lines that stderr did not take)");
        lines.splice(first..first, note.into_bytes());
    }
    let stderr = stderr();
    let mut state = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    let is_ready = poll(&mut state, PollTimeout::ZERO).is_ok_and(|count| count > 0);
    if !is_ready || stderr.lock().write(lines).is_err() {
        LOST.fetch_add(lost + count, Relaxed);
    }
    lines.clear();
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
pub(crate) fn uid(uid: Option<u32>) -> Cow<'static, str> {
    uid.map_or("-".into(), |uid| uid.to_string().into())
}

/// An error and its causes, down to the system's own words.
pub(crate) fn with_sources(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let mut texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.dedup();
    texts.join(": ")
}
