//! Who is measured: this proxy and whichever others are installed, each set up for the same job: add the
//! key, check the upstream's certificate, keep its connections, hold nothing back, log a line per request.

use std::fs::{File, create_dir_all, metadata, read_to_string, write};
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use procfs::process::{Process, all_processes};

use super::Outcome;
use super::load::Target;
use super::upstream::{HOST, KEY, Upstream};

/// How long a proxy may take to listen, and how often it is asked.
const START_TIMEOUT: Duration = Duration::from_secs(10);
const START_POLL: Duration = Duration::from_micros(200);

/// Prints the program that a `codex` from npm starts: it is the one to measure, not Node.js. It is in a
/// package beside that of the script.
const NATIVE_CODEX: &str = r#"script=$(readlink -f "$(command -v codex)") &&
    find "$script" "${script%/bin/*}"/../codex* -type f -name codex -size +1M | head -n 1"#;

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kind {
    /// This proxy
    Ours,
    Nginx,
    Haproxy,
    /// OpenAI's own, a part of Codex
    Codex,
    /// No proxy: from the load straight to the stand-in upstream
    Direct,
}

/// What can be measured.
pub(crate) struct Peer {
    pub(crate) kind: Kind,
    /// For a reader: its name and version.
    pub(crate) title: String,
    program: String,
}

impl Peer {
    /// Finds what is to be measured. This proxy is the program of the same build.
    pub(crate) fn find(kind: Kind) -> Option<Self> {
        let ours = env!("CARGO_BIN_EXE_codex-responses-api-proxy");
        let (name, program) = match kind {
            Kind::Ours => ("this proxy", ours.to_owned()),
            Kind::Nginx => ("nginx", shell("command -v nginx")?),
            Kind::Haproxy => ("haproxy", shell("command -v haproxy")?),
            Kind::Codex => ("codex", shell(NATIVE_CODEX)?),
            Kind::Direct => ("direct", ":".to_owned()),
        };
        // nginx knows `-v` alone.
        let version = format!("('{program}' --version || '{program}' -v) 2>&1");
        let version = shell(&format!("{version} | grep -o '[0-9][0-9.]*' | head -n 1"));
        let version = version.map_or(String::new(), |version| format!(" {version}"));
        let title = format!("{name}{version}");
        Some(Self {
            kind,
            title,
            program,
        })
    }

    /// Its size in megabytes; of a program that needs libraries, without them.
    pub(crate) fn size(&self) -> f64 {
        metadata(&self.program).map_or(f64::NAN, |file| file.len() as f64 / 1e6)
    }

    /// The command that runs it; its configuration goes to `folder`.
    fn command(&self, folder: &Path, port: u16, upstream: &Upstream) -> Outcome<Command> {
        let mut command = Command::new(&self.program);
        let url = format!("https://{HOST}:{}/v1/responses", upstream.port);
        let flags = ["--port", &port.to_string(), "--upstream-url", &url];
        let fill = |file: &str, template: &str| {
            let text = template
                .replace("@PORT@", &port.to_string())
                .replace("@UPSTREAM@", &upstream.port.to_string())
                .replace("@HOST@", HOST)
                .replace("@CA@", &upstream.ca.to_string_lossy())
                .replace("@KEY@", KEY);
            write(folder.join(file), text)
        };
        match self.kind {
            Kind::Ours => {
                command.args(flags).arg("--websocket");
                command.arg("--upstream-ca").arg(&upstream.ca)
            }
            Kind::Nginx => {
                fill("nginx.conf", include_str!("../nginx.conf"))?;
                command.args(["-e", "error.log", "-c", "nginx.conf"]);
                command.arg("-p").arg(folder)
            }
            Kind::Haproxy => {
                fill("haproxy.cfg", include_str!("../haproxy.cfg"))?;
                command.args(["-db", "-f"]).arg(folder.join("haproxy.cfg"))
            }
            Kind::Codex => {
                command.env("CODEX_HOME", folder);
                command.env("SSL_CERT_FILE", &upstream.ca);
                command.arg("responses-api-proxy").args(flags)
            }
            Kind::Direct => &mut command,
        };
        Ok(command)
    }

    /// Starts it with the key on its stdin and waits until it listens. Its files go to `folder`.
    pub(crate) fn start(&self, folder: &Path, upstream: &Upstream) -> Outcome<Running> {
        let mut running = Running {
            target: Target(upstream.port, Some(upstream.connector.clone())),
            child: None,
            start_time: 0.0,
        };
        if self.kind == Kind::Direct {
            return Ok(running);
        }
        let folder = folder.join(format!("{:?}", self.kind));
        let log = folder.join("stderr.log");
        create_dir_all(&folder)?;
        let output = File::create(&log)?;
        // A port that nobody has now.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        running.target = Target(address.port(), None);
        let mut command = self.command(&folder, address.port(), upstream)?;
        command.stdout(output.try_clone()?).stderr(output);
        let begin = Instant::now();
        let child = command.stdin(Stdio::piped()).spawn()?;
        let child = running.child.insert(child);
        // nginx and HAProxy have the key in their configuration, and may close stdin unread.
        let _ = writeln!(child.stdin.take().unwrap(), "{KEY}");
        while TcpStream::connect(address).is_err() {
            if begin.elapsed() > START_TIMEOUT || child.try_wait()?.is_some() {
                return Err(format!("does not listen: {}", read_to_string(log)?).into());
            }
            sleep(START_POLL);
        }
        running.start_time = begin.elapsed().as_secs_f64() * 1e3;
        Ok(running)
    }
}

/// What requests go to, until this is dropped.
pub(crate) struct Running {
    pub(crate) target: Target,
    /// None where there is no proxy between load and upstream.
    child: Option<Child>,
    /// Milliseconds from its start, the key at hand, until it listened.
    pub(crate) start_time: f64,
}

impl Running {
    /// The process that was started, its children, theirs.
    fn processes(&self) -> Outcome<Vec<Process>> {
        let child = self.child.iter();
        let child = child.map(|child| Process::new(child.id().cast_signed()));
        let mut tree = child.collect::<Result<Vec<_>, _>>()?;
        let mut others: Vec<_> = all_processes()?.flatten().collect();
        let mut at = 0;
        while let Some(parent) = tree.get(at).map(Process::pid) {
            let is_child = |it: &mut Process| it.stat().is_ok_and(|stat| stat.ppid == parent);
            tree.extend(others.extract_if(.., is_child));
            at += 1;
        }
        Ok(tree)
    }

    /// The CPU time it has used, in microseconds, that of threads included which are no more; NaN where there
    /// is no proxy.
    pub(crate) fn cpu(&self) -> Outcome<f64> {
        if self.child.is_none() {
            return Ok(f64::NAN);
        }
        let time = |process: &Process| {
            let clock = clock_getcpuclockid(Pid::from_raw(process.pid))?;
            Ok(Duration::from(clock.now()?).as_secs_f64() * 1e6)
        };
        self.processes()?.iter().map(time).sum()
    }

    /// What memory it alone uses and its share of the rest (PSS), in megabytes.
    pub(crate) fn memory(&self) -> Outcome<f64> {
        let memory = |process: &Process| {
            let maps = process.smaps_rollup()?.memory_map_rollup.0;
            let pss = maps.first().and_then(|map| map.extension.map.get("Pss"));
            Ok(*pss.ok_or("no PSS")? as f64 / 1e6)
        };
        self.processes()?.iter().map(memory).sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // Killed, nginx would leave its worker behind.
            let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
            let _ = child.wait();
        }
    }
}

/// What a shell says to `script`. Daemons are not on everybody's PATH.
pub(crate) fn shell(script: &str) -> Option<String> {
    let script = format!("PATH=$PATH:/usr/sbin:/usr/local/sbin; {script}");
    let output = Command::new("sh").args(["-c", &script]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!text.is_empty()).then_some(text)
}
