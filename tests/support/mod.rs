//! What the integration tests share: the proxy as a child process, a stand-in upstream, and a client that
//! writes literal bytes. Nothing here understands the program; it starts it, talks to it and looks at it.

// Every test file is a crate of its own and uses its part of this.
#![allow(dead_code, unused_imports)]

pub(crate) mod client;
pub(crate) mod http;
#[cfg(target_os = "linux")]
pub(crate) mod linux;
#[cfg(target_os = "linux")]
pub(crate) mod memory;
pub(crate) mod proxy;
pub(crate) mod upstream;
pub(crate) mod websocket;

pub(crate) use client::Client;
pub(crate) use http::{Framing, Head, PATIENCE, is_closed};
pub(crate) use proxy::{KEY, Launch, PROGRAM, Proxy};
pub(crate) use upstream::{Exchange, Folder, Script, Seen, Told, Upstream};
pub(crate) use upstream::{echo, events, next_request, ok, telling};
pub(crate) use websocket::{CODEX_HEADERS, HANDSHAKE, both, start_with_websocket};
pub(crate) use websocket::{echo_tunnel, handshake, open_tunnel};
#[cfg(target_os = "linux")]
pub(crate) use {linux::*, memory::Memory};

use nix::libc;
use nix::sys::resource::{Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, geteuid, setgid, setuid};
use std::io::{self, Write, stderr};
use std::net::TcpListener;
use std::os::fd::RawFd;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// How long something that must happen "at once" may take, on a machine with other work to do.
/// OpenAI's own proxy takes 4 s or more where the tests use this.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(2);

/// The proxy in front of a stand-in that does this with every request.
pub(crate) fn serve(script: impl Script) -> (Upstream, Proxy) {
    let upstream = Upstream::start(script);
    let proxy = Launch::to(&upstream).start();
    (upstream, proxy)
}

/// Prints why a test, or a part of one, could not run here.
pub(crate) fn skip(what: &str, why: &str) {
    // Straight to the descriptor: the test harness holds back what `eprintln!` prints in a passing test.
    let _ = writeln!(stderr().lock(), "skipped: {what}: {why}");
}

/// OpenAI's Codex CLI: what the environment names by `CODEX`, or `codex` on PATH.
pub(crate) fn codex() -> Option<String> {
    let codex = std::env::var("CODEX").unwrap_or_else(|_| "codex".to_owned());
    let version = Command::new(&codex).arg("--version").output();
    version.is_ok_and(|v| v.status.success()).then_some(codex)
}

/// Whether the tests run as root; says what is skipped where they don't.
pub(crate) fn is_root_for(what: &str) -> bool {
    if !geteuid().is_root() {
        skip(what, "only root may");
    }
    geteuid().is_root()
}

/// This command line, run by a user without privileges: the one who runs the tests or, if that is root, another one.
/// `None`, with the reason on stderr, where that user cannot execute the program.
pub(crate) fn unprivileged(what: &str, launch: impl Fn() -> Launch) -> Option<Launch> {
    const ID: u32 = 54_321;
    if !geteuid().is_root() {
        return Some(launch());
    }
    let switch = || {
        setgid(Gid::from_raw(ID))?;
        Ok(setuid(Uid::from_raw(ID))?)
    };
    match launch().arg("--version").before_start(switch).try_spawn() {
        Ok(_) => Some(launch().before_start(switch)),
        Err(error) => {
            skip(what, &format!("no other user can run the program: {error}"));
            None
        }
    }
}

/// Waits until this is so, which nothing tells of.
pub(crate) fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "{what}: not even after a while");
        // For the sake of who is to make it so.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Lets this process open this many descriptors.
pub(crate) fn raise_descriptor_limit(needed: u64) {
    let (soft, hard) = getrlimit(RLIMIT_NOFILE).unwrap();
    assert!(hard >= needed, "this test needs {needed} descriptors");
    setrlimit(RLIMIT_NOFILE, soft.max(needed), hard).unwrap();
}

/// A port that nothing listens on, from below the range that the system hands out by itself, so that no other
/// test gets it meanwhile.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 20_000 + (std::process::id() * 37 % 12_000) as u16 + step;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Makes `number` another name of this descriptor, in a process that is about to start.
pub(crate) fn duplicate(descriptor: RawFd, number: RawFd) -> io::Result<()> {
    // SAFETY: the call takes integers; whatever was open at `number` is nothing that the program needs.
    #[allow(unsafe_code)]
    match unsafe { libc::dup2(descriptor, number) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
