//! Support for the integration tests: the proxy as a child process, a stand-in upstream, and a client that sends
//! literal bytes. Except for its command line, this is independent of the program's code.

// Every test file is a separate crate and uses only a part of this.
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
pub(crate) use http::{Framing, Head, TIMEOUT, is_closed};
pub(crate) use proxy::{KEY, PROGRAM, Proxy, ProxyCommand};
pub(crate) use upstream::{
    RecordedRequest, Script, SharedReceiver, TestDir, Upstream, UpstreamRequest,
};
pub(crate) use upstream::{channel, echo, events, next_request, ok};
pub(crate) use websocket::{CODEX_HEADERS, HANDSHAKE, start_tls_and_plain, start_with_websocket};
pub(crate) use websocket::{echo_tunnel, handshake, open_tunnel};
#[cfg(target_os = "linux")]
pub(crate) use {linux::*, memory::Memory};

use nix::libc;
use nix::sys::resource::{Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, geteuid, setgid, setuid};
use std::fs::{self, Permissions};
use std::io::{self, Write, stderr};
use std::net::TcpListener;
use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

/// Timeout for events that must happen immediately. It allows for a busy machine.
/// OpenAI's own proxy takes 4 s or more in the tests that use this.
pub(crate) const PROMPT: Duration = Duration::from_secs(2);

/// Starts a stand-in with this script, and the proxy in front of it.
pub(crate) fn serve(script: impl Script) -> (Upstream, Proxy) {
    let upstream = Upstream::start(script);
    let proxy = ProxyCommand::for_upstream(&upstream).start();
    (upstream, proxy)
}

/// The case with this name in a table of named cases.
pub(crate) fn find_case<T: Copy>(cases: &[(&str, T)], name: &str) -> T {
    let case = cases.iter().find(|(other, _)| *other == name);
    case.unwrap_or_else(|| panic!("no case {name:?}")).1
}

/// Reports why a test, or a part of one, cannot run here.
pub(crate) fn skip(what: &str, why: &str) {
    // Not `eprintln!`: the test harness captures its output and discards it for a passing test.
    let _ = writeln!(stderr().lock(), "skipped: {what}: {why}");
}

/// OpenAI's Codex CLI: the program in the environment variable `CODEX`, or `codex` on PATH.
pub(crate) fn find_codex() -> Option<String> {
    let codex = std::env::var("CODEX").unwrap_or_else(|_| "codex".to_owned());
    let version = Command::new(&codex).arg("--version").output();
    version.is_ok_and(|v| v.status.success()).then_some(codex)
}

/// Whether the tests run as root. If not, reports `what` as skipped.
pub(crate) fn require_root(what: &str) -> bool {
    if !geteuid().is_root() {
        skip(what, "requires root");
    }
    geteuid().is_root()
}

/// This command line as an unprivileged user: the user that runs the tests or, if that is root, another one.
/// `None`, with the reason on stderr, if that user cannot execute the program.
pub(crate) fn unprivileged(what: &str, command: impl Fn() -> ProxyCommand) -> Option<ProxyCommand> {
    const ID: u32 = 54_321;
    if !geteuid().is_root() {
        return Some(command());
    }
    let switch = || {
        setgid(Gid::from_raw(ID))?;
        Ok(setuid(Uid::from_raw(ID))?)
    };
    match command().arg("--version").pre_exec(switch).try_spawn() {
        Ok(_) => Some(command().pre_exec(switch)),
        Err(error) => {
            skip(
                what,
                &format!("other users cannot execute the program: {error}"),
            );
            None
        }
    }
}

/// Makes a directory read-only for unprivileged users, until it is dropped.
pub(crate) struct ReadOnly<'a>(&'a Path);

impl<'a> ReadOnly<'a> {
    pub(crate) fn new(dir: &'a Path) -> Self {
        fs::set_permissions(dir, Permissions::from_mode(0o555)).unwrap();
        Self(dir)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let _ = fs::set_permissions(self.0, Permissions::from_mode(0o755));
    }
}

/// Creates a file that every user may write, like codex-action for its `unprivileged-user` strategy.
pub(crate) fn write_shared(file: &Path, content: &str) {
    fs::write(file, content).unwrap();
    fs::set_permissions(file, Permissions::from_mode(0o666)).unwrap();
}

/// Polls a condition until it holds. Use it only where no event signals the change.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "timed out waiting until {what}");
        // Leaves the CPU to the process that is waited for.
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Raises this process's soft limit to this many descriptors.
pub(crate) fn raise_descriptor_limit(needed: u64) {
    let (soft, hard) = getrlimit(RLIMIT_NOFILE).unwrap();
    assert!(hard >= needed, "this test needs {needed} descriptors");
    setrlimit(RLIMIT_NOFILE, soft.max(needed), hard).unwrap();
}

/// A port without a listener, below the kernel's ephemeral range, so that no other test gets it meanwhile.
pub(crate) fn unused_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 20_000 + (std::process::id() * 37 % 12_000) as u16 + step;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// dup2(2), for use before `exec`.
pub(crate) fn dup2(descriptor: RawFd, number: RawFd) -> io::Result<()> {
    // SAFETY: the call takes integers only. Callers close no descriptor that the program needs.
    #[allow(unsafe_code)]
    match unsafe { libc::dup2(descriptor, number) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
