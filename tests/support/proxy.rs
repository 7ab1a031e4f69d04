//! The real binary as a child process: started, watched, told to stop, and never left behind.

use super::client::{Client, Response};
use super::{http::PATIENCE, upstream::Upstream};
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

/// The key that tests give unless they say otherwise. Long enough that no part of it turns up by chance.
pub(crate) const KEY: &str = "sk-proj-Zq7vXw3mKp9tRb2nYc6hJd4gLf8sUa1eQi5oTx0zWVMk";

/// A command line of the proxy that is yet to be run.
pub(crate) struct Launch {
    command: Command,
    input: Option<Vec<u8>>,
}

impl Launch {
    /// The program without arguments, the usual key on its stdin.
    pub(crate) fn new() -> Self {
        Self::of(Command::new(PROGRAM))
    }

    /// The program without arguments, and nothing on its stdin: it must not wait for a key to find what is wrong.
    pub(crate) fn before_the_key() -> Self {
        Self::new().input_later()
    }

    /// Another program that does the same job, or the same program from another place.
    pub(crate) fn of(mut command: Command) -> Self {
        // What the environment of whoever runs the tests must not decide.
        for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"] {
            command.env_remove(name);
            command.env_remove(name.to_ascii_lowercase());
        }
        for name in ["CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::piped());
        let input = Some(format!("{KEY}\n").into_bytes());
        // In a session of its own: what it starts can be ended with it, and no terminal is asked for the key.
        Self { command, input }.before_start(|| Ok(setsid().map(drop)?))
    }

    /// The program in front of this stand-in.
    pub(crate) fn to(upstream: &Upstream) -> Self {
        Self::new().trusting(upstream).url(&upstream.url())
    }

    pub(crate) fn url(self, url: &str) -> Self {
        self.args(["--upstream-url", url])
    }

    pub(crate) fn trusting(self, upstream: &Upstream) -> Self {
        match upstream.authority() {
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

    pub(crate) fn in_folder(mut self, folder: &Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// What comes on stdin before it ends, instead of the usual key and a newline.
    pub(crate) fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Nothing comes on stdin until the test writes it to [`Proxy::stdin`].
    pub(crate) fn input_later(mut self) -> Self {
        self.input = None;
        self
    }

    pub(crate) fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.command.stdin(stdin);
        self.input_later()
    }

    /// Does this when the program is about to start.
    ///
    /// It may make system calls only, on memory that was allocated before: it runs in a fork of a process with threads.
    pub(crate) fn before_start(
        mut self,
        run: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> Self {
        // SAFETY: the callers keep to the above.
        #[allow(unsafe_code)]
        unsafe {
            self.command.pre_exec(run);
        }
        self
    }

    /// Starts the program, and waits for nothing.
    pub(crate) fn spawn(self) -> Proxy {
        self.try_spawn().unwrap()
    }

    /// The same; an error if it can't even be started.
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
        if let Some(input) = self.input {
            // A program that refuses its input may be gone before it has read it all.
            let _ = stdin.take().unwrap().write_all(&input);
        }
        Ok(Proxy {
            child,
            stdin,
            port: 0,
            lines,
            log: Vec::new(),
        })
    }

    pub(crate) fn start(self) -> Proxy {
        let mut proxy = self.spawn();
        proxy.wait_until_listening();
        proxy
    }

    pub(crate) fn finish(self) -> Finished {
        self.spawn().wait()
    }

    /// Runs the program, which says in one sentence with these words what is wrong, and exits with this status.
    pub(crate) fn assert_one_sentence(self, name: &str, status: i32, words: &[&str]) -> String {
        let run = self.finish();
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

/// A running proxy. It is killed when the test drops it.
pub(crate) struct Proxy {
    child: Child,
    /// The writing end of its stdin, if the test holds it.
    pub(crate) stdin: Option<ChildStdin>,
    /// Where it listens on 127.0.0.1, once it does.
    pub(crate) port: u16,
    /// The lines of its stderr, until it ends.
    lines: Receiver<String>,
    /// Those of them that have been looked at.
    pub(crate) log: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    /// Its stderr, all of it, line by line.
    pub(crate) stderr: Vec<String>,
}

impl Proxy {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(self.port)
    }

    /// The answer to a small well-formed request on a connection of its own.
    pub(crate) fn ask(&self) -> Response {
        self.client().ask().unwrap()
    }

    /// Waits for the line that says where it listens.
    pub(crate) fn wait_until_listening(&mut self) {
        let line = self.wait_for_line(|line| line.contains("listening on "));
        let port = line.rsplit(':').next().unwrap();
        self.port = port.trim().parse().unwrap_or_else(|_| panic!("{line:?}"));
    }

    pub(crate) fn wait_for_line(&mut self, like: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no such line: {:#?}", self.log);
            };
            self.log.push(line.clone());
            if like(&line) {
                return line;
            }
        }
    }

    /// Waits for the line of the next request, and makes sure that it is about one like this and not the key.
    pub(crate) fn wait_for_request(&mut self, beginning: &str, words: &[&str]) -> String {
        let is_one = |line: &str| line.starts_with("request ") || line.starts_with("refused ");
        let line = self.wait_for_line(is_one);
        assert!(line.starts_with(beginning) && !line.contains(KEY), "{line}");
        for word in words {
            assert!(line.contains(word), "{word:?} is not in {line}");
        }
        line
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Asks for the end: by the signal of this name, or else over HTTP.
    pub(crate) fn ask_to_stop(&self, way: &str) {
        match way.parse() {
            Ok(signal) => self.signal(signal),
            Err(_) => assert_eq!(self.client().status_of(way).unwrap(), 200),
        }
    }

    /// Stops it in its tracks, all of its threads, until it is killed or goes on.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        waitpid(self.pid(), Some(WaitPidFlag::WUNTRACED)).unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) fn stop(self) -> Finished {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(self) -> Finished {
        self.wait_for(PATIENCE)
    }

    /// Waits until it has ended by itself, but not longer than this.
    pub(crate) fn wait_for(mut self, patience: Duration) -> Finished {
        let deadline = Instant::now() + patience;
        // Its stderr ends with it.
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
        Finished {
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Its group first, for what it may have started; the id is a group's only while our child is not reaped.
        if self.is_running() {
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}
