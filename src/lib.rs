//! Lets unprivileged users run Codex without holding the OpenAI API key.
//!
//! The program reads the key from stdin, listens on loopback, and forwards `POST /v1/responses` with
//! the key added. Data flows one way through the modules:
//!
//! | step | modules |
//! | --- | --- |
//! | start | [`hardening`], [`cli`], [`target`], [`credential`] |
//! | a client comes in | [`listener`], [`systemd`], [`peer`], [`connection`], [`socket`], [`framing`], [`reader`] |
//! | its request is decided on | [`filter`], [`refusal`] |
//! | and goes up | [`exchange`], [`outgoing`], [`batch`], [`headers`], [`upstream`], [`connector`], [`link`] |
//! | the answer comes back | [`answer`], [`body`], [`writer`], [`log`], [`dump`] |

pub mod allow_list;
pub mod answer;
pub mod batch;
pub mod body;
pub mod cli;
pub mod connection;
pub mod connector;
pub mod credential;
pub mod dump;
pub mod exchange;
pub mod filter;
pub mod framing;
pub mod hardening;
pub mod headers;
pub mod link;
pub mod listener;
pub mod log;
pub mod outgoing;
pub mod peer;
pub mod reader;
pub mod refusal;
pub mod server_info;
#[cfg(target_os = "linux")]
pub mod sock_diag;
pub mod socket;
pub mod stop;
pub mod systemd;
pub mod target;
mod terminal;
pub mod upstream;
pub mod writer;

use std::ffi::OsString;
use std::process::ExitCode;
use std::rc::Rc;

use clap::Parser;
use sd_notify::NotifyState;
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::allow_list::AllowList;
use crate::cli::Arguments;
use crate::connector::Connector;
use crate::credential::Credential;
use crate::dump::Dumper;
use crate::exchange::Proxy;
use crate::outgoing::Opening;
use crate::peer::PeerCheck;
use crate::server_info::ServerInfo;
use crate::stop::Stop;
use crate::target::Target;
use crate::upstream::Upstream;

/// The largest head of a request or an answer, in bytes.
pub const MAX_HEAD_BYTES: usize = 64 << 10;

/// The most headers in a head.
pub const MAX_HEADERS: usize = 128;

/// The status for a command line that can't be understood, as with clap's own.
const BAD_USAGE: u8 = 2;

/// The program: hardens the process, reads the command line (its first item is the program's name)
/// and runs the proxy. To be called first of all in a process.
///
/// Gives status 0 after a clean end, 2 for a bad command line and 1 for anything else that is wrong,
/// with one sentence on stderr.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    if let Err(sentence) = hardening::harden() {
        return fail(&sentence, 1);
    }
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) if !error.use_stderr() => {
            // Help or version. A reader that is gone is no reason to fail.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&cli::explain(&error), BAD_USAGE),
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => fail(&sentence, 1),
    }
}

fn fail(sentence: &str, status: u8) -> ExitCode {
    log::line(format_args!("codex-responses-api-proxy: {sentence}"));
    ExitCode::from(status)
}

/// Runs the proxy until it is asked to end.
///
/// Everything that can be wrong without the key is found before the key is asked for. An error is one
/// sentence on what is wrong and what to do; never with the key in it.
fn run(arguments: &Arguments) -> Result<(), String> {
    let target = Target::parse(&arguments.upstream_url)?;
    let proxy = target::outbound_proxy(&target, |name| std::env::var_os(name))?;
    let allowed = AllowList::parse(&arguments.allow_user)?;
    let connector = Connector::new(&target, proxy, arguments.upstream_ca.as_deref())?;
    let limit = listener::connection_limit(arguments.dump_dir.is_some());
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build_local(LocalOptions::default())
        .map_err(|error| format!("cannot start the event loop: {error}"))?;

    let credential = Credential::from_stdin()?;
    for name in credential.scrub_environment() {
        log::line(format_args!(
            "the key was also in this process's variable {name}: start it with `env -u {name}`"
        ));
    }
    let opening = Opening::new(
        &target.origin_form.to_string(),
        target.host_header,
        credential,
    );

    let listener = listener::open(arguments.port)?;
    let unusable = |error| format!("cannot use the listening socket: {error}");
    let address = listener.local_addr().map_err(unusable)?;
    listener.set_nonblocking(true).map_err(unusable)?;
    let peer_check = PeerCheck::new(allowed, address)?;
    let dumper = arguments.dump_dir.as_deref().map(Dumper::new).transpose()?;

    let outcome = runtime.block_on(async {
        let stop = Rc::new(Stop::default());
        stop_on_signals(&stop).map_err(|error| format!("cannot handle signals: {error}"))?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(unusable)?;
        let upstream = Rc::new(Upstream::new(connector));
        let watched = Rc::clone(&upstream);
        tokio::task::spawn_local(async move {
            watched.warm_up();
            watched.watch().await;
        });
        let proxy = Proxy {
            opening: Rc::new(opening),
            upstream,
            http_shutdown: arguments.http_shutdown,
            peer_check,
            dumper,
            stop: Rc::clone(&stop),
        };
        let _server_info = match &arguments.server_info {
            Some(path) => Some(ServerInfo::write(path, address.port())?),
            None => None,
        };
        log::line(format_args!("listening on http://{address}"));
        systemd::tell(&NotifyState::Ready);
        listener::run(listener, Rc::new(proxy), stop, limit).await;
        log::line(format_args!("stopped"));
        Ok(())
    });
    // A name that is still being looked up is of no use to anybody any more.
    runtime.shutdown_background();
    outcome
}

/// The first SIGTERM or SIGINT begins the end; the second is the end.
fn stop_on_signals(stop: &Rc<Stop>) -> std::io::Result<()> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals = signal(kind)?;
        let stop = Rc::clone(stop);
        tokio::task::spawn_local(async move {
            while signals.recv().await.is_some() {
                if stop.has_begun() {
                    log::line(format_args!("ended at once by a second signal"));
                    std::process::exit(128 + kind.as_raw_value());
                }
                log::line(format_args!(
                    "stopping: requests in flight may finish; a second signal ends them"
                ));
                stop.begin();
            }
        });
    }
    Ok(())
}
