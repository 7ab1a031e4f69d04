//! Listening socket and admission.

use std::{cell::RefCell, collections::HashMap, error::Error, io, net, os::fd::FromRawFd};
use std::{rc::Rc, sync::Arc, time::Duration};

use nix::sys::resource::{Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
use nix::sys::socket::{Backlog, SockType, getsockopt, listen, sockopt};
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

/// How long to wait after a failed accept, mostly for want of descriptors or memory. Trying again at once
/// would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long open streams may go on after shutdown has started.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The listening socket: the one that systemd holds for us (sd_listen_fds(3)), or a new one on 127.0.0.1.
pub(crate) fn open(port: Option<u16>) -> Result<net::TcpListener, String> {
    if let Some(inherited) = inherit(port).transpose() {
        return inherited.map_err(|error| format!("cannot use LISTEN_FDS's sockets: {error}"));
    }
    let foreign = std::env::var_os("LISTEN_FDS").unwrap_or_default();
    if !foreign.is_empty() && foreign != "0" {
        log!("LISTEN_FDS is for another process (LISTEN_PID) and not used; in a shell, use exec");
    }
    let port = port.unwrap_or(0);
    // std sets SO_REUSEADDR, so that a port can be bound again while former connections linger.
    let listener = net::TcpListener::bind((net::Ipv4Addr::LOCALHOST, port)).map_err(|error| {
        format!("cannot listen on 127.0.0.1 port {port}: {error}; choose another --port, or leave it out")
    })?;
    // It listens already; this can fail only where that would have. As many connections may wait to be accepted
    // as the system allows (-1 on Linux: net.core.somaxconn). std's 128 are too few for a burst: the kernel drops
    // the others' handshakes, and they try again only after a second.
    let _ = listen(&listener, Backlog::new(-1).unwrap_or(Backlog::MAXCONN));
    Ok(listener)
}

/// Takes over the socket passed to this process (sd_listen_fds(3)), if it listens on loopback.
#[allow(unsafe_code)]
fn inherit(port: Option<u16>) -> Result<Option<net::TcpListener>, Box<dyn Error>> {
    let mut inherited = sd_notify::listen_fds()?;
    let fd = match (inherited.next(), inherited.len(), port) {
        (None, ..) => return Ok(None),
        (Some(fd), 0, None) => fd,
        (Some(_), 0, Some(_)) => return Err("leave out --port, the socket unit sets it".into()),
        (_, more, _) => return Err(format!("{more} too many, configure exactly one").into()),
    };
    // SAFETY: by sd_listen_fds(3) the descriptor is open and this process's to use, since LISTEN_PID was
    // checked to be its own; it is taken once, here. If it isn't open after all, all that follows fails.
    let socket = unsafe { net::TcpListener::from_raw_fd(fd) };
    let is_stream = getsockopt(&socket, sockopt::SockType)? == SockType::Stream;
    if !is_stream || !getsockopt(&socket, sockopt::AcceptConn)? {
        return Err("it is not a listening stream socket".into());
    }
    if !socket.local_addr()?.ip().is_loopback() {
        return Err("it listens beyond loopback, where others could use the key".into());
    }
    Ok(Some(socket))
}

/// Raises `RLIMIT_NOFILE` to its hard limit. Gives the number of slots that it is enough for: each may
/// need one descriptor for the client and one for the upstream.
fn raise_fd_limit() -> usize {
    let (soft, hard) = getrlimit(RLIMIT_NOFILE).unwrap_or_default();
    let limit = setrlimit(RLIMIT_NOFILE, hard, hard).map_or(soft, |()| hard);
    let descriptors = usize::try_from(limit).unwrap_or(usize::MAX);
    (descriptors.saturating_sub(RESERVED_DESCRIPTORS) / 2).clamp(1, MAX_CONNECTIONS)
}

/// Serves clients until shutdown starts, then waits for those with open requests, at most 30 s, and
/// closes the rest.
///
/// When all slots are taken, new connections wait in the kernel's queue. They are not refused, since a
/// slot may be free in a moment.
pub(crate) async fn run(listener: TcpListener, check: Option<PeerCheck>, handler: &Rc<Handler>) {
    let max_connections = raise_fd_limit();
    let slots = Arc::new(Semaphore::new(max_connections));
    let admission = Rc::new(Admission {
        max_share: max_connections.div_ceil(if check.is_some() { 2 } else { 1 }),
        check,
        shares: RefCell::default(),
        denied_slots: Semaphore::new(MAX_DENIED),
        handler: Rc::clone(handler),
    });
    let mut connections = JoinSet::new();
    let admitting = async {
        loop {
            let permit = Arc::clone(&slots).acquire_owned().await;
            // Frees the memory of those that have ended.
            while connections.try_join_next().is_some() {}
            let stream = accept(&listener).await;
            connections.spawn_local(Rc::clone(&admission).admit(stream, permit));
        }
    };
    tokio::select! {
        biased;
        () = handler.shutdown.wait() => {}
        () = admitting => {}
    }
    drop(listener);
    notify_systemd(&sd_notify::NotifyState::Stopping);
    let all = async { while connections.join_next().await.is_some() {} };
    let _ = timeout(DRAIN_TIMEOUT, all).await;
    connections.shutdown().await;
}

/// The next connection, from this machine.
async fn accept(listener: &TcpListener) -> TcpStream {
    let mut is_failing = false;
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.ip().to_canonical().is_loopback() => return stream,
            // If `route_localnet` is on, neighbouring hosts can reach 127.0.0.1.
            Ok(_) => {}
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
    denied_slots: Semaphore,
    handler: Rc<Handler>,
}

impl Admission {
    /// Serves a client that has a slot, or gives the slot back and denies the client.
    async fn admit(self: Rc<Self>, stream: TcpStream, permit: impl Sized) {
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
            let running = spawn_local(async move { run(listener, None, &handler).await });
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
