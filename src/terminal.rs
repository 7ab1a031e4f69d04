//! Asking for the key on a terminal without showing it.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::credential::read_fd;

/// The signals that would otherwise end or stop the program with the echo still off.
const ENDING_SIGNALS: [libc::c_int; 5] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGTSTP,
];

/// The ending signal that came while the echo was off, or 0.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    CAUGHT.store(signal, Ordering::Relaxed);
}

/// A terminal on stdin whose echo is off for as long as this lives.
pub(crate) struct EchoOff {
    before: libc::termios,
    actions: [libc::sigaction; ENDING_SIGNALS.len()],
}

impl EchoOff {
    /// Prints `prompt` to stderr and turns the echo of stdin off; `None` if stdin is no terminal.
    pub(crate) fn on_stdin(prompt: &[u8]) -> io::Result<Option<Self>> {
        let mut before = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: isatty takes an integer; tcgetattr fills `before`, or says that it didn't.
        let before = unsafe {
            if libc::isatty(libc::STDIN_FILENO) != 1 {
                return Ok(None);
            }
            if libc::tcgetattr(libc::STDIN_FILENO, before.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            before.assume_init()
        };
        // SAFETY: all zeroes is a valid sigaction; `note` is async-signal-safe (one atomic store);
        // no SA_RESTART, so that a read that waits is interrupted.
        let actions = ENDING_SIGNALS.map(|signal| unsafe {
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = note as *const () as libc::sighandler_t;
            let mut theirs = std::mem::zeroed();
            libc::sigaction(signal, &ours, &mut theirs);
            theirs
        });
        let echo_off = Self { before, actions };
        let mut quiet = before;
        quiet.c_lflag &= !libc::ECHO;
        quiet.c_lflag |= libc::ECHONL;
        // SAFETY: `quiet` is a complete termios, `prompt` is valid for its length.
        unsafe {
            if libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, &quiet) != 0 {
                return Err(io::Error::last_os_error());
            }
            libc::write(libc::STDERR_FILENO, prompt.as_ptr().cast(), prompt.len());
        }
        Ok(Some(echo_off))
    }

    /// read(2) from the terminal. A signal that would end the program does so, after the echo is back.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut wait = libc::pollfd {
                fd: libc::STDIN_FILENO,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd, valid for the call.
            let ready = unsafe { libc::poll(&mut wait, 1, -1) };
            let signal = CAUGHT.swap(0, Ordering::Relaxed);
            if signal != 0 {
                self.restore();
                // SAFETY: both take integers; the handlers are the former ones again.
                unsafe { libc::raise(signal) };
                return Err(io::Error::from(io::ErrorKind::Interrupted));
            }
            if ready > 0 {
                return read_fd(libc::STDIN_FILENO, buffer);
            }
        }
    }

    fn restore(&self) {
        // SAFETY: `before` and `actions` are what the system gave us at the start.
        unsafe {
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, &self.before);
            for (signal, action) in ENDING_SIGNALS.iter().zip(&self.actions) {
                libc::sigaction(*signal, action, std::ptr::null_mut());
            }
        }
    }
}

impl Drop for EchoOff {
    fn drop(&mut self) {
        self.restore();
    }
}
