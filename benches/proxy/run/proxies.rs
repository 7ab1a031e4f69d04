//! The proxies: this one and those others that are installed, all configured for the same job: add the key,
//! verify the upstream's certificate, pool connections, buffer no events, log one line per request.

use std::fs::{File, read_to_string, write};
use std::io::Write;
use std::iter::once;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use procfs::process::Process;

use super::Result;
use super::upstream::{HOST, KEY};

/// Time limit for a proxy to listen, and the interval of attempts to connect.
const START_TIMEOUT: Duration = Duration::from_secs(10);
const START_INTERVAL: Duration = Duration::from_millis(1);

/// Shell script that prints the path of Codex's native program. npm's `codex` is a script that starts it with
/// Node.js; the program is in a neighbouring package.
const NATIVE_CODEX: &str = r#"script=$(readlink -f "$(command -v codex)") &&
    find "$script" "${script%/bin/*}"/../codex* -type f -name codex -size +1M | head -n 1"#;

/// Shell scripts that start this proxy and OpenAI's.
const OURS: &str = "exec '@PATH@' --port @PORT@ --upstream-ca ca.pem --websocket \
    --upstream-url https://@HOST@:@UPSTREAM@/v1/responses";
const CODEX: &str = "export CODEX_HOME=. SSL_CERT_FILE=ca.pem; \
    exec '@PATH@' responses-api-proxy --port @PORT@ \
    --upstream-url https://@HOST@:@UPSTREAM@/v1/responses";

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kind {
    /// This proxy
    Ours,
    Nginx,
    Haproxy,
    /// OpenAI's own, a part of Codex
    Codex,
}

pub(crate) struct Proxy {
    pub(crate) kind: Kind,
    /// Name and version.
    pub(crate) title: String,
    path: String,
}

impl Proxy {
    /// Finds an installed proxy; this proxy is the binary of the same build.
    pub(crate) fn find(kind: Kind) -> Option<Self> {
        let ours = env!("CARGO_BIN_EXE_codex-responses-api-proxy");
        let (name, path) = match kind {
            Kind::Ours => ("this proxy", ours.to_owned()),
            Kind::Nginx => ("nginx", shell("command -v nginx")?),
            Kind::Haproxy => ("haproxy", shell("command -v haproxy")?),
            Kind::Codex => ("codex", shell(NATIVE_CODEX)?),
        };
        // nginx supports only `-v`.
        let version = format!("('{path}' --version || '{path}' -v) 2>&1");
        let version = shell(&format!("{version} | grep -o '[0-9][0-9.]*' | head -n 1"))?;
        let title = format!("{name} {version}");
        Some(Self { kind, title, path })
    }

    /// Starts the proxy in `directory`, with the key on stdin, and waits until it listens.
    pub(crate) fn start(&self, directory: &Path, upstream: u16) -> Result<Running> {
        // A free port: it was bound and is closed again.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let port = address.port();
        let fill = |template: &str| {
            let text = template.replace("@PATH@", &self.path);
            let text = text.replace("@PORT@", &port.to_string());
            let text = text.replace("@UPSTREAM@", &upstream.to_string());
            text.replace("@HOST@", HOST).replace("@KEY@", KEY)
        };
        let configuration = |name, text| write(directory.join(name), fill(text));
        configuration("nginx.conf", include_str!("../nginx.conf"))?;
        configuration("haproxy.cfg", include_str!("../haproxy.cfg"))?;
        let script = fill(match self.kind {
            Kind::Ours => OURS,
            Kind::Nginx => "exec '@PATH@' -p . -e error.log -c nginx.conf",
            Kind::Haproxy => "exec '@PATH@' -db -f haproxy.cfg",
            Kind::Codex => CODEX,
        });
        let log = directory.join("stderr.log");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).current_dir(directory);
        command.stdout(Stdio::null()).stderr(File::create(&log)?);
        let mut child = command.stdin(Stdio::piped()).spawn()?;
        // Fails if nginx or HAProxy, which have the key in their configuration, has closed stdin.
        let _ = writeln!(child.stdin.take().unwrap(), "{KEY}");
        let mut running = Running { port, child };
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(address).is_err() {
            if Instant::now() > deadline || running.child.try_wait()?.is_some() {
                return Err(format!("not listening: {}", read_to_string(log)?).into());
            }
            sleep(START_INTERVAL);
        }
        Ok(running)
    }
}

/// A running proxy, terminated on drop.
pub(crate) struct Running {
    pub(crate) port: u16,
    child: Child,
}

impl Running {
    /// The process and its children: nginx's worker.
    fn processes(&self) -> Result<Vec<Process>> {
        let process = Process::new(self.child.id().cast_signed())?;
        let children = process.task_main_thread()?.children()?.into_iter();
        let children = children.map(|pid| Process::new(pid.cast_signed()));
        let processes: Result<_, _> = once(Ok(process)).chain(children).collect();
        Ok(processes?)
    }

    /// CPU time used so far by all threads, exited ones included, in microseconds.
    pub(crate) fn cpu(&self) -> Result<f64> {
        let time = |process: &Process| {
            let clock = clock_getcpuclockid(Pid::from_raw(process.pid))?;
            Ok(Duration::from(clock.now()?).as_secs_f64() * 1e6)
        };
        self.processes()?.iter().map(time).sum()
    }

    /// Proportional set size (PSS, proc_pid_smaps(5)) in MB.
    pub(crate) fn memory(&self) -> Result<f64> {
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
        // SIGKILL would leave nginx's worker behind.
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let _ = self.child.wait();
    }
}

/// The output of a shell script, `None` if empty. Some systems install daemons outside of a user's PATH.
pub(crate) fn shell(script: &str) -> Option<String> {
    let script = format!("PATH=$PATH:/usr/sbin:/usr/local/sbin; {script}");
    let output = Command::new("sh").args(["-c", &script]).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!text.is_empty()).then_some(text)
}
