//! Listening socket and admission.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::{
    cell::RefCell, collections::HashMap, io, net::Ipv4Addr, rc::Rc, sync::Arc, time::Duration,
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::sockopt::{AcceptConn, SockType};
use nix::sys::socket::{self, Backlog, getsockopt};
use sd_notify::NotifyState;
use tokio::net::{TcpListener, TcpStream};
use tokio::{sync::Semaphore, task::JoinSet, time::timeout};

use super::connection;
use crate::exchange::{Handler, Peer, TOO_MANY_CONNECTIONS, USER_NOT_ALLOWED};
use crate::{log::notify_systemd, peer::PeerCheck};

/// The most connections at once, if there are descriptors for that many.
const MAX_CONNECTIONS: usize = 4096;

/// The most connections at once of denied users. They take no slot; further ones are closed without a response.
const MAX_DENIED: usize = 16;

/// How long a denied user's connection stays open, the response to its first request included.
const DENIED_TIMEOUT: Duration = Duration::from_secs(5);

/// Descriptors that are never used for slots: standard streams, listener, event loop, name service, dumps.
const RESERVED_DESCRIPTORS: usize = 24 + MAX_DENIED;

/// How many connections may wait to be accepted: as many as the system allows (net.core.somaxconn). std's 128
/// are too few for a burst: the kernel drops the others' handshakes, and they try again only after a second.
#[cfg(target_os = "linux")]
const BACKLOG: Backlog = Backlog::MAXALLOWABLE;
#[cfg(not(target_os = "linux"))]
const BACKLOG: Backlog = Backlog::MAXCONN;

/// How long to wait after a failed accept, mostly for want of descriptors or memory. Trying again at once
/// would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long open streams may go on after shutdown has started.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The listening socket: the one that systemd holds for us (sd_listen_fds(3)), or a new one.
pub(crate) fn open(port: Option<u16>) -> Result<std::net::TcpListener, String> {
    let unusable = |error: io::Error| format!("cannot use the sockets in LISTEN_FDS: {error}");
    let mut inherited = sd_notify::listen_fds().map_err(unusable)?;
    let count = std::env::var_os("LISTEN_FDS").unwrap_or_default();
    if inherited.len() == 0 && !count.is_empty() && count != "0" {
        log!(
            "LISTEN_FDS is set for another process (LISTEN_PID): its sockets are not used; in a shell, start the proxy with exec"
        );
    }
    match (inherited.len(), inherited.next(), port) {
        (0, ..) => bind(port.unwrap_or(0)),
        (1, Some(fd), None) => adopt_inherited(fd).map_err(unusable),
        (1, ..) => Err(
            "systemd passes the socket (LISTEN_FDS): leave out --port, the socket unit sets it"
                .into(),
        ),
        (count, ..) => Err(format!(
            "LISTEN_FDS passes {count} sockets: configure exactly one"
        )),
    }
}

/// Opens a listening socket on 127.0.0.1.
fn bind(port: u16) -> Result<std::net::TcpListener, String> {
    // std sets SO_REUSEADDR, so that a port can be bound again while former connections linger.
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let listener = listener.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("port {port} on 127.0.0.1 is taken: choose another --port, or leave it out")
        }
        _ => format!("cannot listen on 127.0.0.1 port {port}: {error}"),
    })?;
    // It listens already; this can fail only where that would have.
    let _ = socket::listen(&listener, BACKLOG);
    Ok(listener)
}

/// Takes over a socket passed to this process (sd_listen_fds(3)), if it listens on loopback.
#[allow(unsafe_code)]
fn adopt_inherited(fd: RawFd) -> io::Result<std::net::TcpListener> {
    // SAFETY: by sd_listen_fds(3) the descriptor is open and this process's to use, since LISTEN_PID was
    // checked to be its own; it is taken once, here. If it isn't open after all, all that follows fails.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let is_stream = getsockopt(&socket, SockType)? == socket::SockType::Stream;
    if !is_stream || !getsockopt(&socket, AcceptConn)? {
        return Err(io::Error::other("it is not a listening stream socket"));
    }
    let listener = std::net::TcpListener::from(socket);
    match listener.local_addr()?.ip().is_loopback() {
        true => Ok(listener),
        false => Err(io::Error::other(
            "it listens beyond loopback, where others could use the key",
        )),
    }
}

/// Raises `RLIMIT_NOFILE` to its hard limit. Gives the number of slots that it is enough for: each may
/// need one descriptor for the client and one for the upstream.
pub(crate) fn raise_fd_limit() -> usize {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or_default();
    let is_raised = setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if is_raised { hard } else { soft };
    let descriptors = usize::try_from(limit).unwrap_or(usize::MAX);
    (descriptors.saturating_sub(RESERVED_DESCRIPTORS) / 2).clamp(1, MAX_CONNECTIONS)
}

/// Accepts clients until shutdown starts, then waits for those with open requests, at most 30 s, and
/// closes the rest.
///
/// When all slots are taken, new connections wait in the kernel's queue. They are not refused, since a
/// slot may be free in a moment.
pub(crate) async fn run(
    listener: TcpListener,
    check: Option<PeerCheck>,
    max_connections: usize,
    handler: &Rc<Handler>,
) {
    let admission = Rc::new(Admission {
        max_share: max_connections.div_ceil(if check.is_some() { 2 } else { 1 }),
        check,
        shares: RefCell::default(),
        slots: Arc::new(Semaphore::new(max_connections)),
        denied_slots: Semaphore::new(MAX_DENIED),
        handler: Rc::clone(handler),
    });
    let mut connections = JoinSet::new();
    tokio::select! {
        biased;
        () = handler.shutdown.wait() => {}
        () = accept(&listener, &admission, &mut connections) => {}
    }
    drop(listener);
    notify_systemd(&NotifyState::Stopping);
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(DRAIN_TIMEOUT, all).await;
    connections.shutdown().await;
}

/// Never returns.
async fn accept(listener: &TcpListener, admission: &Rc<Admission>, connections: &mut JoinSet<()>) {
    let mut is_failing = false;
    loop {
        let permit = Arc::clone(&admission.slots).acquire_owned().await;
        // Frees the memory of those that have ended.
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            // Where `route_localnet` is on, neighbouring hosts can reach 127.0.0.1.
            Ok((_, peer)) if !peer.ip().to_canonical().is_loopback() => {}
            Ok((stream, _)) => {
                is_failing = false;
                let admission = Rc::clone(admission);
                connections.spawn_local(async move { admission.admit(stream, permit).await });
            }
            // The client was gone before it was accepted.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                if !std::mem::replace(&mut is_failing, true) {
                    log!("cannot accept a connection: {error}; waiting");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Which clients are served, and with how many connections.
struct Admission {
    check: Option<PeerCheck>,
    /// The most connections of one user: half of the slots, or all where users are not identified.
    max_share: usize,
    /// For each user seen so far, a counter that each of the user's connections holds.
    shares: RefCell<HashMap<Option<u32>, Rc<()>>>,
    slots: Arc<Semaphore>,
    denied_slots: Semaphore,
    handler: Rc<Handler>,
}

impl Admission {
    /// Serves a client that has a slot, or gives the slot back and denies the client.
    async fn admit(&self, stream: TcpStream, permit: impl Sized) {
        let (uid, is_allowed) = match &self.check {
            Some(check) => check.identify(&stream).await,
            None => (None, true),
        };
        let share = Rc::clone(self.shares.borrow_mut().entry(uid).or_default());
        // The map has one reference, too.
        let denial = match Rc::strong_count(&share) - 1 > self.max_share {
            _ if !is_allowed => Some(&USER_NOT_ALLOWED),
            true => Some(&TOO_MANY_CONNECTIONS),
            false => None,
        };
        let peer = Peer { uid, denial };
        if denial.is_none() {
            return connection::serve(stream, peer, &self.handler).await;
        }
        drop((permit, share));
        if let Ok(_permit) = self.denied_slots.try_acquire() {
            let serving = connection::serve(stream, peer, &self.handler);
            let _ = timeout(DENIED_TIMEOUT, serving).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::{LocalSet, spawn_local};
    use tokio::{net::TcpStream, time::Instant};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn open_requests_have_30_s_after_shutdown_starts() {
        let story = async {
            let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/", upstream.local_addr().unwrap());
            let proxy = Handler::for_tests(&url);
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let handler = Rc::clone(&proxy);
            let running = spawn_local(async move { run(listener, None, 1, &handler).await });
            let mut client = TcpStream::connect(address).await.unwrap();
            let request = b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n";
            client.write_all(request).await.unwrap();
            let (mut stream, _) = upstream.accept().await.unwrap();
            stream.read_exact(&mut [0; 16]).await.unwrap();
            let begun = Instant::now();
            proxy.shutdown.trigger();
            running.await.unwrap();
            let lasted = begun.elapsed().as_millis();
            assert!((30_000..30_010).contains(&lasted), "{lasted} ms");
            assert_eq!(client.read(&mut [0; 16]).await.unwrap_or(0), 0);
        };
        LocalSet::new().run_until(story).await;
    }
}
