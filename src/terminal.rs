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
    mask: libc::sigset_t,
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
        let (mask, actions) = hold_signals();
        let echo_off = Self {
            before,
            mask,
            actions,
        };
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
    ///
    /// The signals are held back except while this waits (pselect(2)), so that none is missed.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            // SAFETY: all zeroes is a valid fd_set, 0 is a descriptor that fits it, and the other
            // arguments may be null.
            let ready = unsafe {
                let mut input: libc::fd_set = std::mem::zeroed();
                libc::FD_SET(libc::STDIN_FILENO, &mut input);
                let null = std::ptr::null_mut();
                libc::pselect(1, &mut input, null, null, std::ptr::null(), &self.mask)
            };
            let signal = CAUGHT.swap(0, Ordering::Relaxed);
            if signal != 0 {
                self.restore();
                // SAFETY: it takes an integer; handlers and mask are the former ones again.
                unsafe { libc::raise(signal) };
                return Err(io::Error::from(io::ErrorKind::Interrupted));
            }
            if ready > 0 {
                return read_fd(libc::STDIN_FILENO, buffer);
            }
        }
    }

    fn restore(&self) {
        // SAFETY: all three are what the system gave us at the start.
        unsafe {
            libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, &self.before);
            for (signal, action) in ENDING_SIGNALS.iter().zip(&self.actions) {
                libc::sigaction(*signal, action, std::ptr::null_mut());
            }
            libc::sigprocmask(libc::SIG_SETMASK, &self.mask, std::ptr::null_mut());
        }
    }
}

impl Drop for EchoOff {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Blocks the ending signals, and has them noted once they are let through. Gives the former mask and
/// actions.
fn hold_signals() -> (libc::sigset_t, [libc::sigaction; ENDING_SIGNALS.len()]) {
    // SAFETY: all zeroes is a valid sigset_t and sigaction; `note` is async-signal-safe (one atomic
    // store); no SA_RESTART, so that a wait is interrupted.
    unsafe {
        let mut held: libc::sigset_t = std::mem::zeroed();
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut held);
        for signal in ENDING_SIGNALS {
            libc::sigaddset(&mut held, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &held, &mut mask);
        let actions = ENDING_SIGNALS.map(|signal| {
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = note as *const () as libc::sighandler_t;
            let mut theirs: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, &ours, &mut theirs);
            theirs
        });
        (mask, actions)
    }
}
