//! Runs the real binary as a child process, reads its log, and kills it at the end of the test.

use super::client::{Client, Response};
use super::{http::TIMEOUT, upstream::Upstream};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, setsid};
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_codex-responses-api-proxy");

/// The default key of tests. Long enough that no part of it occurs in memory by chance.
pub(crate) const KEY: &str = "sk-proj-Zq7vXw3mKp9tRb2nYc6hJd4gLf8sUa1eQi5oTx0zWVMk";

/// A command line of the proxy, like [`Command`].
pub(crate) struct ProxyCommand {
    command: Command,
    stdin_bytes: Option<Vec<u8>>,
}

impl ProxyCommand {
    /// The program without arguments and with the default key on its stdin.
    pub(crate) fn new() -> Self {
        Self::from_command(Command::new(PROGRAM))
    }

    /// The program without arguments and with an open, silent stdin. It must report errors without reading the key.
    pub(crate) fn without_key() -> Self {
        Self::new().open_stdin()
    }

    /// A compatible program, or the same program in another place.
    pub(crate) fn from_command(mut command: Command) -> Self {
        // The environment of the test run must not affect the tests.
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
            command.env_remove(name);
            command.env_remove(name.to_ascii_lowercase());
        }
        for name in ["CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let stdin_bytes = Some(format!("{KEY}\n").into_bytes());
        let this = Self {
            command,
            stdin_bytes,
        };
        // A new session: `Drop` can kill the whole process group, and no terminal can prompt for the key.
        this.pre_exec(|| Ok(setsid().map(drop)?))
    }

    /// The program with `--upstream-url` and `--upstream-ca` for this stand-in.
    pub(crate) fn for_upstream(upstream: &Upstream) -> Self {
        Self::new().trust(upstream).url(&upstream.url())
    }

    pub(crate) fn url(self, url: &str) -> Self {
        self.args(["--upstream-url", url])
    }

    pub(crate) fn trust(self, upstream: &Upstream) -> Self {
        match upstream.ca_file() {
            Some(file) => self.arg("--upstream-ca").arg(file),
            None => self,
        }
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Writes these bytes to stdin instead of the default key and a newline, and closes it.
    pub(crate) fn stdin_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin_bytes = Some(bytes.into());
        self
    }

    /// Keeps stdin open. The test writes to [`Proxy::stdin`].
    pub(crate) fn open_stdin(mut self) -> Self {
        self.stdin_bytes = None;
        self
    }

    pub(crate) fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.command.stdin(stdin);
        self.open_stdin()
    }

    /// Runs this in the child before `exec`.
    ///
    /// It runs in a fork of a process with threads, so it may only make system calls, and must not allocate memory.
    pub(crate) fn pre_exec(
        mut self,
        run: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        // SAFETY: callers follow the rule above.
        #[allow(unsafe_code)]
        unsafe {
            self.command.pre_exec(run);
        }
        self
    }

    /// Starts the program without waiting until it listens.
    pub(crate) fn spawn(self) -> Proxy {
        self.try_spawn().unwrap()
    }

    /// The same, but returns an error if the program cannot be executed.
    pub(crate) fn try_spawn(mut self) -> io::Result<Proxy> {
        let mut child = self.command.spawn()?;
        let (line, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || {
            for text in stderr.split(b'\n').map_while(Result::ok) {
                let _ = line.send(String::from_utf8_lossy(&text).into_owned());
            }
        });
        let mut stdin = child.stdin.take();
        if let Some(bytes) = self.stdin_bytes {
            // A program that rejects its input may exit before it has read all of it.
            let _ = stdin.take().unwrap().write_all(&bytes);
        }
        Ok(Proxy {
            child,
            stdin,
            port: 0,
            lines,
            log: Vec::new(),
        })
    }

    /// Starts the program and waits until it listens.
    pub(crate) fn start(self) -> Proxy {
        let mut proxy = self.spawn();
        proxy.wait_until_listening();
        proxy
    }

    /// Runs the program until it exits.
    pub(crate) fn run(self) -> Output {
        self.spawn().wait()
    }

    /// Runs the program. Checks that it prints one line with these words to stderr and exits with this status.
    pub(crate) fn assert_startup_error(self, name: &str, status: i32, words: &[&str]) -> String {
        let run = self.run();
        assert_eq!(run.status.code(), Some(status), "{name}: {run:?}");
        assert_eq!(run.stdout, "", "{name}");
        let [line] = run.stderr.as_slice() else {
            panic!("{name}: not one line but {:#?}", run.stderr);
        };
        let is_ours = line.starts_with("codex-responses-api-proxy: ");
        assert!(is_ours && !line.contains("panic"), "{name}: {line}");
        assert!(!line.contains(KEY), "{name}: {line}");
        for word in words {
            assert!(line.contains(word), "{name}: {word:?} is not in {line}");
        }
        line.clone()
    }
}

/// A running proxy, killed on drop.
pub(crate) struct Proxy {
    child: Child,
    /// The writing end of its stdin, if the test keeps it open.
    pub(crate) stdin: Option<ChildStdin>,
    /// Its port on 127.0.0.1, once it listens.
    pub(crate) port: u16,
    /// Lines of stderr not read yet. Disconnected once the process exits.
    lines: Receiver<String>,
    /// Lines of stderr read so far.
    pub(crate) log: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    /// All lines of stderr.
    pub(crate) stderr: Vec<String>,
}

impl Proxy {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.port)
    }

    /// The response to a small well-formed request on a new connection.
    pub(crate) fn post_default(&self) -> Response {
        self.client().post_default().unwrap()
    }

    /// Waits for the line that names the address.
    pub(crate) fn wait_until_listening(&mut self) {
        let line = self.wait_for_line(|line| line.contains("listening on "));
        let port = line.rsplit(':').next().unwrap();
        self.port = port.trim().parse().unwrap_or_else(|_| panic!("{line:?}"));
    }

    pub(crate) fn wait_for_line(&mut self, matches: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no matching line: {:#?}", self.log);
            };
            self.log.push(line.clone());
            if matches(&line) {
                return line;
            }
        }
    }

    /// Waits for the next access log line. Checks how it begins, that it has these words, and that the key is not in it.
    pub(crate) fn wait_for_request(&mut self, beginning: &str, words: &[&str]) -> String {
        let is_entry = |line: &str| line.starts_with("request ") || line.starts_with("refused ");
        let line = self.wait_for_line(is_entry);
        assert!(line.starts_with(beginning) && !line.contains(KEY), "{line}");
        for word in words {
            assert!(line.contains(word), "{word:?} is not in {line}");
        }
        line
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Starts shutdown with the signal of this name, or with this HTTP request.
    pub(crate) fn trigger_shutdown(&self, trigger: &str) {
        match trigger.parse() {
            Ok(signal) => self.signal(signal),
            Err(_) => assert_eq!(self.client().status_of(trigger).unwrap(), 200),
        }
    }

    /// Stops all of its threads with SIGSTOP. SIGCONT resumes them.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends SIGTERM and waits for the process to exit.
    pub(crate) fn stop(self) -> Output {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Waits for the process to exit.
    pub(crate) fn wait(self) -> Output {
        self.wait_for(TIMEOUT)
    }

    /// Waits for the process to exit, at most this long.
    pub(crate) fn wait_for(mut self, timeout: Duration) -> Output {
        let deadline = Instant::now() + timeout;
        // The process closes stderr when it exits.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.log.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(_) => panic!("still running: {:#?}", self.log),
            }
        }
        let status = self.child.wait().unwrap();
        let stdout = io::read_to_string(self.child.stdout.take().unwrap()).unwrap();
        let stderr = std::mem::take(&mut self.log);
        Output {
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The group includes the child's own children. The process group id is valid until the child is reaped.
        if self.is_running() {
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}
