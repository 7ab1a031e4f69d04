//! Who is measured: this proxy and whichever others are installed, each set up for the same job.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::config;
use crate::process::{self, Guard, Running, START_POLL};
use crate::upstream::Upstream;
use crate::wire::KEY;

/// How long a proxy may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// A kind of proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ours,
    Nginx,
    Haproxy,
    Codex,
}

/// A proxy that can be measured.
pub(crate) struct Peer {
    pub(crate) kind: Kind,
    pub(crate) version: String,
    binary: PathBuf,
}

impl Kind {
    pub(crate) const OTHERS: [Self; 3] = [Self::Nginx, Self::Haproxy, Self::Codex];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ours => "this proxy",
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Codex => "codex",
        }
    }

    fn version_flag(self) -> &'static str {
        match self {
            Self::Nginx | Self::Haproxy => "-v",
            Self::Ours | Self::Codex => "--version",
        }
    }
}

/// Everything that is here to be measured, ours first.
pub(crate) fn all(folder: &Path) -> Vec<Peer> {
    let others = Kind::OTHERS
        .into_iter()
        .filter_map(|kind| Some((kind, find(kind, folder)?)));
    std::iter::once((Kind::Ours, ours()))
        .chain(others)
        .map(|(kind, binary)| Peer {
            kind,
            version: version(kind, &binary),
            binary,
        })
        .collect()
}

/// This proxy: the program just built, unless `PROXY` names another build of it.
pub(crate) fn ours() -> PathBuf {
    let built = env!("CARGO_BIN_EXE_codex-responses-api-proxy");
    std::env::var_os("PROXY").map_or_else(|| built.into(), PathBuf::from)
}

/// The program that the variable named like the kind says, or else one on `PATH` (or where daemons
/// are, which is not on everybody's). An empty variable leaves it out.
fn find(kind: Kind, folder: &Path) -> Option<PathBuf> {
    let named = std::env::var_os(kind.name().to_uppercase()).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    let mut candidates: Vec<PathBuf> = places.map(|place| place.join(kind.name())).collect();
    if let Some(named) = named {
        candidates = vec![named];
    }
    let found = candidates.into_iter().find(|file| file.is_file())?;
    match kind {
        Kind::Codex => behind_wrapper(&found, folder),
        _ => Some(found),
    }
}

/// The program that a `codex` from npm starts: it is the one to measure, not Node.js.
fn behind_wrapper(codex: &Path, folder: &Path) -> Option<PathBuf> {
    let mut magic = [0; 4];
    File::open(codex).ok()?.read_exact(&mut magic).ok()?;
    if magic == *b"\x7fELF" {
        return Some(codex.to_owned());
    }
    let info = folder.join("codex.json");
    let mut command = Command::new(codex);
    command
        .args(["responses-api-proxy", "--http-shutdown", "--server-info"])
        .arg(&info)
        .env("CODEX_HOME", folder);
    let mut running = Guard(process::quiet(&mut command, folder).ok()?);
    running.0.stdin.take()?.write_all(KEY.as_bytes()).ok()?;
    let start = Instant::now();
    let told: serde_json::Value = loop {
        match std::fs::read(&info).map(|text| serde_json::from_slice(&text)) {
            Ok(Ok(told)) => break told,
            _ if start.elapsed() > START_TIMEOUT => return None,
            _ => std::thread::sleep(START_POLL),
        }
    };
    let program = std::fs::read_link(format!("/proc/{}/exe", told["pid"].as_u64()?)).ok();
    // Killing the wrapper would leave the program behind.
    let port = u16::try_from(told["port"].as_u64()?).ok()?;
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
    let _ = stream.write_all(b"GET /shutdown HTTP/1.1\r\nhost: localhost\r\n\r\n");
    let _ = running.0.wait();
    program
}

fn version(kind: Kind, binary: &Path) -> String {
    let output = Command::new(binary).arg(kind.version_flag()).output();
    let text = output.map_or_else(
        |_| Vec::new(),
        |output| [output.stdout, output.stderr].concat(),
    );
    // The first word with a digit first: `nginx version: nginx/1.22.1` has it behind a slash.
    String::from_utf8_lossy(&text)
        .split([' ', '/', '\n', '-'])
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or("unknown")
        .to_owned()
}

impl Peer {
    /// The program's size in bytes; for the dynamically linked ones without their libraries.
    pub(crate) fn size(&self) -> u64 {
        std::fs::metadata(&self.binary).map_or(0, |data| data.len())
    }

    /// What a reader of the figures must know of this peer's setting.
    pub(crate) fn note(&self) -> &'static str {
        match self.kind {
            Kind::Ours => "logs a line per request to stderr, which is a file",
            Kind::Nginx => {
                "one process, `access_log` to a file, no buffering, 100 kept upstream connections"
            }
            Kind::Haproxy => {
                "one thread, `log stderr` to a file, `http-reuse always`, `no-delay`, 100 kept upstream connections"
            }
            Kind::Codex => {
                "`responses-api-proxy`, given the CA by `SSL_CERT_FILE`; logs no requests"
            }
        }
    }

    /// The command that runs this peer.
    pub(crate) fn command(
        &self,
        folder: &Path,
        port: u16,
        upstream: &Upstream,
    ) -> std::io::Result<Command> {
        let mut command = Command::new(&self.binary);
        match self.kind {
            Kind::Ours => {
                command.args(config::arguments(port, upstream));
                command.arg("--upstream-ca").arg(&upstream.ca);
            }
            Kind::Nginx => {
                std::fs::write(folder.join("nginx.conf"), config::nginx(port, upstream))?;
                command.arg("-p").arg(folder);
                command.args(["-c", "nginx.conf", "-e", "error.log"]);
            }
            Kind::Haproxy => {
                let file = folder.join("haproxy.cfg");
                std::fs::write(&file, config::haproxy(port, upstream))?;
                command.arg("-db").arg("-f").arg(file);
            }
            Kind::Codex => {
                command
                    .arg("responses-api-proxy")
                    .args(config::arguments(port, upstream))
                    .env("CODEX_HOME", folder)
                    .env("SSL_CERT_FILE", &upstream.ca);
            }
        }
        Ok(command)
    }

    /// Starts it and waits until it listens.
    pub(crate) fn start(
        &self,
        folder: &Path,
        upstream: &Upstream,
    ) -> Result<Running, Box<dyn Error>> {
        let port = process::free_port()?;
        let mut command = self.command(folder, port, upstream)?;
        process::start(&mut command, folder, port, START_TIMEOUT)
            .map_err(|error| format!("{}: {error}", self.kind.name()).into())
    }
}
