//! From the command line to a running proxy.

use std::{env::var_os, io, net::SocketAddr, rc::Rc};

use nix::unistd::geteuid;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::task::spawn_local;

use crate::cli::Arguments;
use crate::client::listener;
use crate::exchange::{Allowed, Handler, dump::Dumper};
use crate::key::{Credential, KeyRule};
use crate::upstream::outbound_proxy::outbound_proxy;
use crate::upstream::{Connector, Upstream, target::Target, trusted_roots::trusted_roots};
use crate::{log, peer::PeerCheck, server_info::ServerInfo, shutdown::Shutdown};

/// The most threads that look up names and groups and write dumps.
const MAX_BLOCKING_THREADS: usize = 16;

/// A proxy that lacks only the key.
pub(crate) struct Server {
    connector: Connector,
    listener: TcpListener,
    address: SocketAddr,
    peer_check: Option<PeerCheck>,
    allowed: Allowed,
    dumper: Option<Dumper>,
    server_info: Option<ServerInfo>,
    runtime: LocalRuntime,
}

impl Server {
    /// Opens and checks all that the command line and the environment name.
    pub(crate) fn prepare(arguments: &Arguments) -> Result<Self, String> {
        let target = Target::parse(&arguments.upstream_url)?;
        let proxy = outbound_proxy(&target, |name| var_os(name))?;
        let roots = trusted_roots(arguments.upstream_ca.as_deref(), |name| var_os(name))?;
        let mut connector = Connector::new(target, proxy, roots);
        let listener = listener::open(arguments.port)?;
        let unusable = |error: io::Error| format!("cannot use the listening socket: {error}");
        let address = listener.local_addr().map_err(unusable)?;
        listener.set_nonblocking(true).map_err(unusable)?;
        let check = |users: &[String]| PeerCheck::new("--allow-user", users, address);
        let peer_check = arguments.allow_user.as_deref().map(check).transpose()?;
        let owner = arguments.upstream_user.as_ref();
        if connector.target.tls_name.is_none() {
            connector.owner = owner_check(owner, address)?;
        } else if owner.is_some() {
            return Err("--upstream-user is for plain http:// upstreams only: leave it out".into());
        }
        let dumper = arguments.dump_dir.as_deref().map(Dumper::new).transpose()?;
        let allowed = Allowed {
            http_shutdown: arguments.http_shutdown,
            websocket: arguments.websocket,
            is_dumping: dumper.is_some(),
        };
        if allowed.websocket && allowed.is_dumping {
            log!("with --dump-dir, WebSocket handshakes get 426 and clients use POST instead");
        }
        let server_info = arguments.server_info.as_deref();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(MAX_BLOCKING_THREADS)
            .on_thread_park(log::flush)
            .build_local(LocalOptions::default())
            .map_err(|error| format!("cannot start the event loop: {error}"))?;
        let listener = runtime.block_on(async { TcpListener::from_std(listener) });
        Ok(Self {
            connector,
            listener: listener.map_err(unusable)?,
            address,
            peer_check,
            allowed,
            dumper,
            server_info: server_info.map(ServerInfo::prepare).transpose()?,
            runtime,
        })
    }

    /// The keys that the upstream's provider issues.
    pub(crate) fn key_rule(&self) -> KeyRule {
        match self.connector.target.origin.host() {
            Some("api.openai.com") => KeyRule::OPENAI,
            _ => KeyRule::BEARER_TOKEN,
        }
    }

    /// Serves clients until shutdown is complete.
    pub(crate) fn serve(self, credential: Credential) -> Result<(), String> {
        for name in credential.scrub_environment() {
            let name = name.display();
            log!("the key was also in the variable {name}: start the proxy with `env -u {name}`");
        }
        log::set_buffering(true);
        let outcome = self.runtime.block_on(async {
            let shutdown = Shutdown::default();
            shutdown.trigger_on_signals()?;
            let upstream = Rc::new(Upstream::new(self.connector, credential));
            spawn_local(Rc::clone(&upstream).maintain());
            let port = self.address.port();
            let file = self.server_info.map(|file| file.publish(port));
            shutdown.server_info.set(file.transpose()?);
            #[cfg(target_os = "linux")]
            crate::privileges::drop_root(self.allowed.is_dumping)?;
            let handler = Rc::new(Handler {
                upstream,
                allowed: self.allowed,
                dumper: self.dumper,
                shutdown,
            });
            log!("listening on http://{}", self.address);
            log::notify_systemd(&NotifyState::Ready);
            listener::run(self.listener, self.peer_check, &handler).await;
            if let Some(dumper) = &handler.dumper {
                dumper.finish().await;
            }
            log!("stopped");
            Ok(())
        });
        log::set_buffering(false);
        // Nobody waits for a name that is still being looked up.
        self.runtime.shutdown_background();
        outcome
    }
}

/// The check of a plain upstream's owner: root, the user who started the program, or `user`. Where the
/// kernel can't tell, there is none, and one line in the log says so.
fn owner_check(user: Option<&String>, listener: SocketAddr) -> Result<Option<PeerCheck>, String> {
    let mut trusted = vec!["0".into(), geteuid().to_string()];
    trusted.extend(user.cloned());
    match PeerCheck::new("--upstream-user", &trusted, listener) {
        Err(error) if user.is_none() => {
            log!("the upstream's owner is not checked: {error}");
            Ok(None)
        }
        check => check.map(Some),
    }
}
