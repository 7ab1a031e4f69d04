//! Graceful shutdown: one flag that every connection watches, and the signals that set it.

use std::{cell::Cell, rc::Rc};

use tokio::signal::unix::{SignalKind, signal};
use tokio::{sync::watch, task::spawn_local};

use crate::server_info::ServerInfo;

/// Whether the program shuts down. Clones share the flag.
#[derive(Clone, Default)]
pub(crate) struct Shutdown {
    is_triggered: watch::Sender<bool>,
    /// Removed when shutdown starts: it names a port that refuses connections from then on.
    pub(crate) server_info: Rc<Cell<Option<ServerInfo>>>,
}

impl Shutdown {
    /// Starts shutdown; idempotent.
    pub(crate) fn trigger(&self) {
        self.server_info.set(None);
        self.is_triggered.send_replace(true);
    }

    /// Whether shutdown has started.
    pub(crate) fn is_triggered(&self) -> bool {
        *self.is_triggered.borrow()
    }

    /// Returns once shutdown has started.
    pub(crate) async fn wait(&self) {
        // An error means that nobody can start it any more, and `self` can.
        let _ = self.is_triggered.subscribe().wait_for(|is| *is).await;
    }

    /// SIGTERM, SIGINT, SIGHUP and SIGQUIT start graceful shutdown; a second signal exits.
    pub(crate) fn trigger_on_signals(&self) -> Result<(), String> {
        let failed = |error| format!("cannot handle signals: {error}");
        let kinds = [SignalKind::terminate(), SignalKind::interrupt()].into_iter();
        // nohup(1) and shells ignore these two for programs that outlive the terminal.
        let terminal = [SignalKind::hangup(), SignalKind::quit()].into_iter();
        for kind in kinds.chain(terminal.filter(|kind| !is_ignored(*kind))) {
            let mut signals = signal(kind).map_err(failed)?;
            let shutdown = self.clone();
            spawn_local(async move {
                while signals.recv().await.is_some() {
                    if shutdown.is_triggered() {
                        log!("exiting at once: second signal");
                        crate::log::flush();
                        std::process::exit(128 + kind.as_raw_value());
                    }
                    log!("stopping: requests in flight may finish; a second signal exits at once");
                    shutdown.trigger();
                }
            });
        }
        Ok(())
    }
}

/// Whether this process ignores a signal (proc_pid_status(5), `SigIgn`). Assumed where there is no
/// `/proc`, as on macOS: then the signal keeps its disposition.
fn is_ignored(kind: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_none_or(|mask| mask >> (kind.as_raw_value() - 1) & 1 == 1)
}
