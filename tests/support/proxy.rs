//! The real binary as a child process: started, watched, told to stop, and never left behind.

use super::{PATIENCE, client::Client, upstream::Upstream};
use std::{
    ffi::OsStr,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

/// The program under test.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_codex-responses-api-proxy");

/// The key that tests give unless they say otherwise. Long enough that no part of it turns up by chance.
pub(crate) const KEY: &str = "sk-proj-Zq7vXw3mKp9tRb2nYc6hJd4gLf8sUa1eQi5oTx0zWVMk";

/// What the environment of whoever runs the tests must not decide.
const PROXY_VARIABLES: [&str; 8] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
];

/// A command line of the proxy that is yet to be run.
pub(crate) struct Launch {
    command: Command,
    input: Option<Vec<u8>>,
    group: bool,
}

impl Launch {
    /// The program without arguments, the usual key on its stdin.
    pub(crate) fn new() -> Self {
        Self::of(Command::new(PROGRAM))
    }

    /// Another program that does the same job, or the same program from another place.
    pub(crate) fn of(mut command: Command) -> Self {
        for variable in PROXY_VARIABLES {
            command.env_remove(variable);
        }
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self {
            command,
            input: Some(format!("{KEY}\n").into_bytes()),
            group: true,
        }
    }

    /// The program in front of this stand-in.
    pub(crate) fn to(upstream: &Upstream) -> Self {
        let launch = Self::new().args(["--upstream-url", &upstream.url()]);
        match upstream.authority() {
            Some(file) => launch.arg("--upstream-ca").arg(file),
            None => launch,
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

    /// This is the program's stdin.
    pub(crate) fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.command.stdin(stdin);
        self.input = None;
        self
    }

    /// It makes itself a session before it is the program: the leader of a group could not.
    pub(crate) fn makes_itself_a_session(mut self) -> Self {
        self.group = false;
        self
    }

    /// The command itself, for what is only asked once.
    pub(crate) fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Starts the program, and waits for nothing.
    pub(crate) fn spawn(mut self) -> Proxy {
        if self.group {
            // So that what it starts can be ended with it.
            self.command.process_group(0);
        }
        let description = format!("{:?}", self.command);
        let mut child = self.command.spawn().unwrap();
        let (line, lines) = mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        thread::spawn(move || {
            for text in stderr.split(b'\n').map_while(Result::ok) {
                let _ = line.send(String::from_utf8_lossy(&text).into_owned());
            }
        });
        let (end, ended) = mpsc::channel();
        let pid = child.id();
        thread::spawn(move || {
            wait_for(pid, libc::WEXITED);
            let _ = end.send(());
        });
        let mut stdin = child.stdin.take();
        if let Some(input) = self.input {
            // A program that refuses its input may be gone before it has read it all.
            let _ = stdin.take().unwrap().write_all(&input);
        }
        Proxy {
            child,
            description,
            stdin,
            port: 0,
            lines,
            ended,
            log: Vec::new(),
        }
    }

    /// Starts the program and waits until it listens.
    pub(crate) fn start(self) -> Proxy {
        let mut proxy = self.spawn();
        proxy.wait_until_listening();
        proxy
    }

    /// Runs the program to its end.
    pub(crate) fn finish(self) -> Finished {
        self.spawn().wait()
    }
}

/// A running proxy. It is killed when the test drops it.
pub(crate) struct Proxy {
    child: Child,
    /// Its command line and environment, for a test that fails.
    description: String,
    /// The writing end of its stdin, if the test holds it.
    pub(crate) stdin: Option<ChildStdin>,
    /// Where it listens on 127.0.0.1, once it does.
    pub(crate) port: u16,
    lines: Receiver<String>,
    ended: Receiver<()>,
    /// The lines of its stderr that have been looked at.
    pub(crate) log: Vec<String>,
}

/// How a run of the program ended.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    /// Its stderr, all of it, line by line.
    pub(crate) stderr: Vec<String>,
}

impl Proxy {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the line that says where it listens.
    pub(crate) fn wait_until_listening(&mut self) {
        let line = self.wait_for_line(|line| line.contains("listening on "));
        let port = line.rsplit(':').next().unwrap();
        self.port = port.trim().parse().unwrap_or_else(|_| panic!("{line:?}"));
    }

    /// Waits for a line on stderr like this one.
    pub(crate) fn wait_for_line(&mut self, mut like: impl FnMut(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .recv_timeout(left)
                .unwrap_or_else(|error| panic!("{error} waiting for a line after {:#?}", self.log));
            self.log.push(line.clone());
            if like(&line) {
                return line;
            }
        }
    }

    pub(crate) fn signal(&self, signal: libc::c_int) {
        // SAFETY: `kill` takes any numbers; the process is our child and not reaped yet, so the id is its.
        #[allow(unsafe_code)]
        let result = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    /// Asks for the end: by `SIGTERM` or `SIGINT`, or else over HTTP.
    pub(crate) fn ask_to_stop(&self, way: &str) {
        match way {
            "SIGTERM" => self.signal(libc::SIGTERM),
            "SIGINT" => self.signal(libc::SIGINT),
            _ => {
                let mut client = Client::connect(self.port);
                client
                    .send("GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    .unwrap();
                assert_eq!(client.response().unwrap().status(), 200);
            }
        }
    }

    /// Stops it in its tracks, all of its threads, until it is killed.
    pub(crate) fn freeze(&self) {
        self.signal(libc::SIGSTOP);
        wait_for(self.pid(), libc::WSTOPPED | libc::WEXITED);
    }

    /// Whether it is still running.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) fn stop(self) -> Finished {
        self.signal(libc::SIGTERM);
        self.wait()
    }

    /// Waits for its end, but not longer than this; whether it has ended.
    pub(crate) fn ends_within(&self, patience: Duration) -> bool {
        self.ended.recv_timeout(patience).is_ok()
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(mut self) -> Finished {
        // Told once; after that, nobody is there to tell.
        if self.ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            self.log.extend(self.lines.try_iter());
            panic!("{} is still running: {:#?}", self.description, self.log);
        }
        let status = self.child.wait().unwrap();
        let mut stdout = String::new();
        let mut pipe = self.child.stdout.take().unwrap();
        pipe.read_to_string(&mut stdout).unwrap();
        let mut stderr = std::mem::take(&mut self.log);
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => stderr.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("stderr is still open after the end"),
            }
        }
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
        if let Ok(None) = self.child.try_wait() {
            // SAFETY: `killpg` takes any numbers, and the group is the one made for this child.
            #[allow(unsafe_code)]
            unsafe {
                libc::killpg(self.child.id().cast_signed(), libc::SIGKILL);
            }
            let _ = self.child.wait();
        }
    }
}

/// Blocks until this has happened to a child, and leaves the child as it is.
fn wait_for(pid: u32, what: libc::c_int) {
    loop {
        // SAFETY: an all-zero `siginfo_t` is a valid one, and the call only fills it in.
        #[allow(unsafe_code)]
        let result = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            libc::waitid(libc::P_PID, pid, &mut info, what | libc::WNOWAIT)
        };
        // Interrupted: once more. Anything else, such as a child already reaped by the guard, is an end too.
        if result == 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return;
        }
    }
}

/// The program says in one sentence that contains these words what is wrong, and exits with this status.
pub(crate) fn assert_one_sentence(name: &str, status: i32, run: &Finished, words: &[&str]) {
    assert_eq!(run.status.code(), Some(status), "{name}: {run:?}");
    assert_eq!(run.stdout, "", "{name}");
    let [line] = run.stderr.as_slice() else {
        panic!("{name}: not one line but {:#?}", run.stderr);
    };
    assert!(
        line.starts_with("codex-responses-api-proxy: "),
        "{name}: {line}"
    );
    for word in words {
        assert!(line.contains(word), "{name}: {word:?} is not in {line}");
    }
    assert!(
        !line.contains(KEY) && !line.contains("panic"),
        "{name}: {line}"
    );
}
