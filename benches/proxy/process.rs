//! Proxies as processes: started with the key, waited for, and never left behind.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::wire::KEY;

/// How often a starting proxy is asked whether it listens.
pub(crate) const START_POLL: Duration = Duration::from_micros(200);

/// A process that ends when this is dropped.
pub(crate) struct Guard(pub(crate) Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A proxy under measurement.
pub(crate) struct Running {
    guard: Guard,
    pub(crate) port: u16,
    /// From its start, the key at hand, until it listened.
    pub(crate) start_time: Duration,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.guard.0.id()
    }

    /// Waits until it ends.
    pub(crate) fn wait(&mut self) -> std::io::Result<()> {
        self.guard.0.wait().map(drop)
    }
}

/// Starts `command` with the key on stdin, and all it says in a file of `folder`.
pub(crate) fn quiet(command: &mut Command, folder: &Path) -> std::io::Result<Child> {
    let log = File::create(folder.join("stderr.log"))?;
    command
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
}

/// Starts a proxy with the key on its stdin, and waits until it listens on `port`.
pub(crate) fn start(
    command: &mut Command,
    folder: &Path,
    port: u16,
    patience: Duration,
) -> Result<Running, Box<dyn Error>> {
    let begin = Instant::now();
    let mut guard = Guard(quiet(command, folder)?);
    if let Some(mut stdin) = guard.0.stdin.take() {
        // nginx and HAProxy have it in their configuration, and may close stdin unread.
        let _ = writeln!(stdin, "{KEY}");
    }
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        if begin.elapsed() > patience || guard.0.try_wait()?.is_some() {
            let said = std::fs::read_to_string(folder.join("stderr.log")).unwrap_or_default();
            return Err(format!("does not listen: {said}").into());
        }
        std::thread::sleep(START_POLL);
    }
    Ok(Running {
        guard,
        port,
        start_time: begin.elapsed(),
    })
}

/// A port that nobody has now.
pub(crate) fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}
