//! Lets unprivileged users run Codex without holding the OpenAI API key.
//!
//! The program reads the key from stdin, listens on loopback, and forwards `POST /v1/responses` with
//! the key added. Its rooms; data goes down, and comes back as an answer's body:
//!
//! | room | holds |
//! | --- | --- |
//! | [`client`] | what comes in: the listening socket, connections |
//! | [`exchange`] | one request: may it pass, its headers, its answer's body, its dump and line in the log |
//! | [`upstream`] | what goes out: the target, connecting, adding the credential, links that are kept |
//! | [`key`] | the credential: read once, in a page of its own |
//!
//! Beside them is what every program needs: [`cli`], [`failure`], [`hardening`], [`limits`], [`log`], [`peer`], `privileges`,
//! [`server_info`], [`sock_diag`], [`stop`].

pub mod cli;
pub mod client;
pub mod exchange;
pub mod failure;
mod flush;
pub mod hardening;
pub mod key;
pub mod limits;
pub mod log;
pub mod peer;
#[cfg(target_os = "linux")]
pub mod privileges;
pub mod server_info;
#[cfg_attr(not(target_os = "linux"), path = "sock_diag_unsupported.rs")]
pub mod sock_diag;
pub mod stop;
pub mod upstream;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::rc::Rc;

use clap::Parser;
use nix::unistd::geteuid;
use sd_notify::NotifyState;
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::Arguments;
use crate::client::listener;
use crate::exchange::dump::Dumper;
use crate::exchange::{Allowed, Proxy};
use crate::key::{Credential, KeyRule};
use crate::peer::PeerCheck;
use crate::stop::Stop;
use crate::upstream::target::Target;
use crate::upstream::{Connector, Upstream, outbound_proxy};

/// The status for a command line that can't be understood, as with clap's own.
const BAD_USAGE: u8 = 2;

/// How many threads look names and groups up and write dumps, at the most.
const MAX_BLOCKING_THREADS: usize = 16;

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
    let variable = |name: &str| std::env::var_os(name);
    let proxy = outbound_proxy::outbound_proxy(&target, variable)?;
    let ca_file = upstream::ca_file(arguments.upstream_ca.as_deref(), variable);
    let mut connector = Connector::new(&target, proxy, ca_file)?;
    let limit = listener::connection_limit();
    let listener = listener::open(arguments.port)?;
    let unusable = |error| format!("cannot use the listening socket: {error}");
    let address = listener.local_addr().map_err(unusable)?;
    listener.set_nonblocking(true).map_err(unusable)?;
    let check = PeerCheck::new("--allow-user", &arguments.allow_user, address)?;
    connector.owner = owner_check(&target, arguments.upstream_user.as_ref(), address)?;
    let dumper = arguments.dump_dir.as_deref().map(Dumper::new).transpose()?;
    let allowed = Allowed {
        http_shutdown: arguments.http_shutdown,
        websocket: arguments.websocket,
        is_dumping: dumper.is_some(),
    };
    if allowed.websocket && allowed.is_dumping {
        log::line(format_args!(
            "with --dump-dir, WebSocket handshakes get 426 and clients use POST, which is dumped"
        ));
    }
    let server_info = arguments.server_info.as_deref();
    let server_info = server_info.map(server_info::Prepared::new).transpose()?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .build_local(LocalOptions::default())
        .map_err(|error| format!("cannot start the event loop: {error}"))?;

    let rule = match target.tls_name.as_deref() {
        Some("api.openai.com") => KeyRule::OPENAI,
        _ => KeyRule::BEARER_TOKEN,
    };
    let credential = Credential::from_stdin(rule)?;
    for name in credential.scrub_environment() {
        log::line(format_args!(
            "the key was also in this process's variable {name}: start it with `env -u {name}`"
        ));
    }

    let outcome = runtime.block_on(async {
        let stop = Stop::default();
        stop_on_signals(&stop).map_err(|error| format!("cannot handle signals: {error}"))?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(unusable)?;
        let upstream = Rc::new(Upstream::new(target, connector, credential));
        let kept = Rc::clone(&upstream);
        tokio::task::spawn_local(async move { kept.maintain().await });
        let proxy = Rc::new(Proxy {
            upstream,
            allowed,
            dumper,
            stop,
        });
        if let Some(prepared) = server_info {
            let published = prepared.publish(address.port())?;
            proxy.stop.remove_at_start(published);
        }
        #[cfg(target_os = "linux")]
        privileges::drop_root(arguments.dump_dir.is_some())?;
        log::line(format_args!("listening on http://{address}"));
        log::tell_systemd(&NotifyState::Ready);
        listener::run(listener, check, limit, Rc::clone(&proxy)).await;
        if let Some(dumper) = &proxy.dumper {
            dumper.finish().await;
        }
        log::line(format_args!("stopped"));
        Ok(())
    });
    // A name that is still being looked up is of no use to anybody any more.
    runtime.shutdown_background();
    outcome
}

/// The check of a plain upstream's owner: root, the user who started the program, or `user`. Where the
/// kernel can't tell, there is none, and one line in the log says so.
fn owner_check(
    target: &Target,
    user: Option<&String>,
    address: SocketAddr,
) -> Result<Option<PeerCheck>, String> {
    if target.tls_name.is_some() {
        let unused = "--upstream-user is for plain http:// upstreams only: leave it out";
        return user.map_or(Ok(None), |_| Err(unused.into()));
    }
    let mut trusted = vec!["0".into(), geteuid().to_string()];
    trusted.extend(user.cloned());
    match PeerCheck::new("--upstream-user", &trusted, address) {
        Err(error) if user.is_none() => {
            log::line(format_args!("the upstream's owner is not checked: {error}"));
            Ok(None)
        }
        check => check,
    }
}

/// The first SIGTERM, SIGINT, SIGHUP or SIGQUIT begins the end; the second is the end.
fn stop_on_signals(stop: &Stop) -> std::io::Result<()> {
    let kinds = [SignalKind::terminate(), SignalKind::interrupt()].into_iter();
    // nohup(1) and shells ignore these two for programs that outlive the terminal.
    let terminal = [SignalKind::hangup(), SignalKind::quit()].into_iter();
    for kind in kinds.chain(terminal.filter(|kind| !is_ignored(*kind))) {
        let mut signals = signal(kind)?;
        let stop = stop.clone();
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

/// Whether this process ignores a signal (proc_pid_status(5), `SigIgn`). Assumed where there is no `/proc`, as on
/// macOS: then the signal keeps its disposition.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_none_or(|mask| mask >> (kind.as_raw_value() - 1) & 1 == 1)
}
