//! The listening socket: where it comes from, and who gets in when.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::sockopt::{AcceptConn, SockType};
use nix::sys::socket::{self, Backlog, getsockopt};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::connection;
use crate::exchange::{Peer, Proxy};
use crate::log;
use crate::peer::PeerCheck;

/// The most connections at once, if there are descriptors for that many.
const MAX_CONNECTIONS: usize = 4096;

/// The most connections at once of users who aren't served. They hold no place; one more is closed unanswered.
const MAX_REFUSED: usize = 16;

/// How long a connection of a user who isn't served stays, the refusal of its first request included.
const REFUSED_TIMEOUT: Duration = Duration::from_secs(5);

/// Descriptors that are never used for clients who are served: standard streams, listener, event loop,
/// name service, dumps.
const RESERVED_DESCRIPTORS: usize = 24 + MAX_REFUSED;

/// How many connections may wait to be accepted. std's 128 are too few for a burst: what comes on top
/// is not refused, but tries again only after a second.
const BACKLOG: i32 = 4096;

/// How long to wait when a connection could not be accepted, for want of descriptors or memory mostly:
/// trying again at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long streams in flight may go on after the end has begun.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

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
    let count = std::env::var_os("LISTEN_FDS").unwrap_or_default();
    if inherited.len() == 0 && !count.is_empty() && count != "0" {
        log::line(format_args!(
            "LISTEN_FDS is set, but not for this process (LISTEN_PID): its sockets are not used; in a shell, start the proxy with exec"
        ));
    }
    match (inherited.len(), inherited.next(), port) {
        (0, ..) => bind(port.unwrap_or(0)),
        (1, Some(fd), None) => adopt(fd).map_err(unusable),
        (1, ..) => Err("--port is given, but the socket comes from systemd (LISTEN_FDS): leave it out, the socket unit sets the port".into()),
        (count, ..) => Err(format!("LISTEN_FDS hands over {count} sockets: configure exactly one")),
    }
}

/// Opens a listening socket on 127.0.0.1.
fn bind(port: u16) -> Result<std::net::TcpListener, String> {
    // std sets SO_REUSEADDR, so that a port can be bound again while former connections linger.
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("port {port} on 127.0.0.1 is taken: choose another with --port, or leave it out for a free one")
        }
        _ => format!("cannot listen on 127.0.0.1 port {port}: {error}"),
    })?;
    // It listens already; this can fail only where that would have.
    let _ = Backlog::new(BACKLOG).and_then(|backlog| socket::listen(&listener, backlog));
    Ok(listener)
}

/// Takes over a socket that was passed to this process (sd_listen_fds(3)), if it is one that listens on
/// loopback.
#[allow(unsafe_code)]
fn adopt(fd: RawFd) -> io::Result<std::net::TcpListener> {
    // SAFETY: by sd_listen_fds(3) the descriptor is open and this process's to use, if LISTEN_PID is its
    // own, which was looked at; it is taken once, here. If it isn't open after all, all that follows fails.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let is_stream = getsockopt(&socket, SockType)? == socket::SockType::Stream;
    if !is_stream || !getsockopt(&socket, AcceptConn)? {
        return Err(io::Error::other("it is no listening stream socket"));
    }
    let listener = std::net::TcpListener::from(socket);
    if !listener.local_addr()?.ip().is_loopback() {
        return Err(io::Error::other(
            "it listens on more than loopback, where others could use the key",
        ));
    }
    Ok(listener)
}

/// Raises `RLIMIT_NOFILE` to its hard limit and says how many clients that is enough for: each may
/// need a descriptor of its own and one to the upstream.
#[must_use]
pub fn connection_limit() -> usize {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    let is_raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if is_raised { hard } else { soft };
    let descriptors = usize::try_from(limit).unwrap_or(usize::MAX);
    (descriptors.saturating_sub(RESERVED_DESCRIPTORS) / 2).clamp(1, MAX_CONNECTIONS)
}

/// Accepts clients, at most `limit` at once, until the end begins, then waits for those in flight, at most
/// 30 s, and ends the rest. `check` says who may come in, unless everybody may.
///
/// At the limit, new connections wait in the kernel's queue until an old one ends. They are not
/// refused: whoever holds the others may be done in a moment.
pub async fn run(listener: TcpListener, check: Option<PeerCheck>, limit: usize, proxy: Rc<Proxy>) {
    let mut connections = JoinSet::new();
    tokio::select! {
        biased;
        () = proxy.stop.begun() => {}
        () = accept(&listener, check, limit, &proxy, &mut connections) => {}
    }
    drop(listener);
    log::tell_systemd(&sd_notify::NotifyState::Stopping);
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(DRAIN_TIMEOUT, all).await;
    connections.shutdown().await;
}

/// Never ends.
async fn accept(
    listener: &TcpListener,
    check: Option<PeerCheck>,
    limit: usize,
    proxy: &Rc<Proxy>,
    connections: &mut JoinSet<()>,
) {
    let check = Rc::new(check);
    let [places, refused] = [limit, MAX_REFUSED].map(|places| Arc::new(Semaphore::new(places)));
    // For each user who is served, something that each of its connections has.
    let shares: Rc<RefCell<HashMap<_, Rc<()>>>> = Rc::default();
    let mut is_failing = false;
    loop {
        let place = Arc::clone(&places).acquire_owned().await;
        // Those that have ended.
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            // Where `route_localnet` is on, neighbours reach 127.0.0.1, too.
            Ok((_, peer)) if !peer.ip().to_canonical().is_loopback() => {}
            Ok((stream, _)) => {
                is_failing = false;
                let (check, refused) = (Rc::clone(&check), Arc::clone(&refused));
                let (proxy, shares) = (Rc::clone(proxy), Rc::clone(&shares));
                connections.spawn_local(async move {
                    let (uid, is_allowed) = match &*check {
                        Some(check) => check.identify(&stream).await,
                        None => (None, true),
                    };
                    let share = (check.is_some() && is_allowed)
                        .then(|| Rc::clone(shares.borrow_mut().entry(uid).or_default()));
                    // The map has one, too.
                    let count = share
                        .as_ref()
                        .map_or(0, |share| Rc::strong_count(share) - 1);
                    let exceeds_share = count > limit.div_ceil(2);
                    let peer = Peer {
                        uid,
                        is_denied: !is_allowed || exceeds_share,
                        exceeds_share,
                    };
                    if !peer.is_denied {
                        return connection::serve(stream, peer, proxy).await;
                    }
                    drop((place, share));
                    if let Ok(_place) = refused.try_acquire() {
                        let serving = connection::serve(stream, peer, proxy);
                        let _ = timeout(REFUSED_TIMEOUT, serving).await;
                    }
                });
            }
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !std::mem::replace(&mut is_failing, true) {
                    log::line(format_args!("cannot accept a connection: {error}; waiting"));
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::{LocalSet, spawn_local};
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_in_flight_at_the_end_has_30_seconds() {
        let story = async {
            let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/", upstream.local_addr().unwrap());
            let proxy = Proxy::for_tests(&url);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let running = spawn_local(run(listener, None, 1, Rc::clone(&proxy)));
            let mut client = TcpStream::connect(address).await.unwrap();
            let request = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n";
            client.write_all(request).await.unwrap();
            let (mut stream, _) = upstream.accept().await.unwrap();
            stream.read_exact(&mut [0; 16]).await.unwrap();
            let begun = Instant::now();
            proxy.stop.begin();
            running.await.unwrap();
            let lasted = begun.elapsed().as_millis();
            assert!((30_000..30_010).contains(&lasted), "{lasted} ms");
            assert_eq!(client.read(&mut [0; 16]).await.unwrap_or(0), 0);
        };
        LocalSet::new().run_until(story).await;
    }
}
