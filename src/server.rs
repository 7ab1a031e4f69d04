//! From the command line to a running proxy.

use std::{env::var_os, io, net::SocketAddr, rc::Rc};

use nix::unistd::geteuid;
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::task::spawn_local;

use crate::cli::Arguments;
use crate::client::listener::{self, raise_fd_limit};
use crate::exchange::{Allowed, Handler, dump::Dumper};
use crate::key::{Credential, KeyRule};
use crate::log;
use crate::peer::PeerCheck;
use crate::server_info::ServerInfo;
use crate::shutdown::Shutdown;
use crate::upstream::outbound_proxy::outbound_proxy;
use crate::upstream::{Connector, Upstream, target::Target, trusted_roots::trusted_roots};

/// The most threads that look up names and groups and write dumps.
const MAX_BLOCKING_THREADS: usize = 16;

/// A proxy that lacks only the key.
pub(crate) struct Server {
    connector: Connector,
    listener: std::net::TcpListener,
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
        let address = listener.local_addr().map_err(unusable)?;
        listener.set_nonblocking(true).map_err(unusable)?;
        let peer_check = PeerCheck::new("--allow-user", &arguments.allow_user, address)?;
        let owner = arguments.upstream_user.as_ref();
        connector.owner = owner_check(&connector.target, owner, address)?;
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
        Ok(Self {
            connector,
            listener,
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
        let tls_name = &self.connector.target.tls_name;
        match tls_name.as_ref().map(|name| name.to_str()).as_deref() {
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
        let max_connections = raise_fd_limit();
        log::set_buffering(true);
        let outcome = self.runtime.block_on(async {
            let shutdown = Shutdown::default();
            let signals = shutdown.trigger_on_signals();
            signals.map_err(|error| format!("cannot handle signals: {error}"))?;
            let listener = TcpListener::from_std(self.listener).map_err(unusable)?;
            let upstream = Rc::new(Upstream::new(self.connector, credential));
            spawn_local(Rc::clone(&upstream).maintain());
            if let Some(mut file) = self.server_info {
                file.publish(self.address.port())?;
                shutdown.remove_at_start(file);
            }
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
            listener::run(listener, self.peer_check, max_connections, &handler).await;
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

fn unusable(error: io::Error) -> String {
    format!("cannot use the listening socket: {error}")
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
            log!("the upstream's owner is not checked: {error}");
            Ok(None)
        }
        check => check,
    }
}
