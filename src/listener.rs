//! The listening socket: where it comes from, and who gets in when.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::connection;
use crate::exchange::Proxy;
use crate::log;
use crate::stop::Stop;
use crate::systemd;

/// The most connections at once, if there are descriptors for that many.
const MAX_CONNECTIONS: usize = 16_384;

/// Descriptors that are never used for clients: standard streams, listener, event loop, name service,
/// idle upstream connections that are just being closed.
const RESERVED_DESCRIPTORS: usize = 24;

/// How many connections may wait to be accepted. std's 128 are too few for a burst: what comes on top
/// is not refused, but tries again only after a second.
const BACKLOG: libc::c_int = 4096;

/// How long to wait when the system has no descriptor or memory for another connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// How long streams in flight may go on after the end has begun.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The listening socket: the one that systemd holds for us (sd_listen_fds(3)), or a new one.
///
/// # Errors
///
/// A sentence: `port` is given beside a socket, is taken or may not be used, or the socket is not the
/// one that listens on loopback.
pub fn open(port: Option<u16>) -> Result<std::net::TcpListener, String> {
    let unusable =
        |error: io::Error| format!("the sockets handed over in LISTEN_FDS can't be used: {error}");
    let mut inherited = sd_notify::listen_fds().map_err(unusable)?;
    match (inherited.len(), inherited.next(), port) {
        (0, ..) => bind(port.unwrap_or(0)),
        (1, Some(fd), None) => systemd::adopt(fd).map_err(unusable),
        (1, ..) => Err(
            "--port is given, but the socket comes from systemd (LISTEN_FDS): leave --port out, \
                        the port is set in the socket unit"
                .into(),
        ),
        (count, ..) => Err(format!(
            "LISTEN_FDS hands over {count} sockets: configure exactly one"
        )),
    }
}

/// Opens a listening socket on 127.0.0.1.
#[allow(unsafe_code)]
fn bind(port: u16) -> Result<std::net::TcpListener, String> {
    // std sets SO_REUSEADDR, so that a port can be bound again while former connections linger.
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("port {port} on 127.0.0.1 is taken: choose another with --port, or leave it out for a free one")
        }
        _ => format!("cannot listen on 127.0.0.1 port {port}: {error}"),
    })?;
    // SAFETY: the call takes a descriptor, which `listener` keeps open, and a number. It can fail
    // only where the first one, by std, would have.
    unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) };
    Ok(listener)
}

/// Raises `RLIMIT_NOFILE` to its hard limit and says how many clients that is enough for: each may
/// need a descriptor of its own and one to the upstream, and two for the files that dump its exchange.
#[allow(unsafe_code)]
#[must_use]
pub fn connection_limit(dumps: bool) -> usize {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid rlimit, which the first call fills and the second reads.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) != 0 {
            return 1;
        }
        let soft = limit.rlim_cur;
        limit.rlim_cur = limit.rlim_max;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &limit) != 0 {
            limit.rlim_cur = soft;
        }
    }
    let descriptors = usize::try_from(limit.rlim_cur).unwrap_or(usize::MAX);
    let each = if dumps { 4 } else { 2 };
    (descriptors.saturating_sub(RESERVED_DESCRIPTORS) / each).clamp(1, MAX_CONNECTIONS)
}

/// Accepts clients until the end begins, then waits for those in flight, at most [`DRAIN_TIMEOUT`].
///
/// At the limit, new connections wait in the kernel's queue until an old one ends. They are not
/// refused: whoever holds the others may be done in a moment.
pub async fn run(listener: TcpListener, proxy: Rc<Proxy>, stop: Rc<Stop>, limit: usize) {
    let places = Arc::new(Semaphore::new(limit));
    let accepting = async {
        let mut is_exhausted = false;
        loop {
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    is_exhausted = false;
                    let (proxy, stop) = (Rc::clone(&proxy), Rc::clone(&stop));
                    tokio::task::spawn_local(async move {
                        connection::serve(stream, proxy, stop).await;
                        drop(place);
                    });
                }
                Err(error) if is_exhaustion(&error) => {
                    if !is_exhausted {
                        log::line(format_args!("cannot accept a connection: {error}; waiting"));
                    }
                    is_exhausted = true;
                    tokio::time::sleep(EXHAUSTED_PAUSE).await;
                }
                // The client was gone before it was accepted.
                Err(_) => {}
            }
        }
    };
    tokio::select! {
        biased;
        () = stop.begun() => {}
        () = accepting => {}
    }
    drop(listener);
    systemd::tell(&NotifyState::Stopping);
    let all = u32::try_from(limit).expect("the limit is far below that");
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, places.acquire_many(all)).await;
}

/// Whether accept(2) failed for want of descriptors or memory: trying again at once would spin.
fn is_exhaustion(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    )
}
