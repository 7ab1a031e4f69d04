//! The listening socket: where it comes from, and who gets in when.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::connection;
use crate::exchange::Proxy;
use crate::log;
use crate::stop::Stop;

/// The most connections at once, if there are descriptors for that many.
const MAX_CONNECTIONS: usize = 16_384;

/// Descriptors that are never used for clients: standard streams, listener, event loop, name service,
/// idle upstream connections that are just being closed.
const RESERVED_DESCRIPTORS: usize = 24;

/// How long to wait when the system has no descriptor or memory for another connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// How long streams in flight may go on after the end has begun.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Opens the listening socket on 127.0.0.1.
///
/// # Errors
///
/// A sentence, where the port is taken or may not be used.
pub fn bind(port: u16) -> Result<std::net::TcpListener, String> {
    // std sets SO_REUSEADDR, so that a port can be bound again while former connections linger.
    std::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("port {port} on 127.0.0.1 is taken: choose another with --port, or leave it out for a free one")
        }
        _ => format!("cannot listen on 127.0.0.1 port {port}: {error}"),
    })
}

/// Raises `RLIMIT_NOFILE` to its hard limit and says how many clients that is enough for: each may
/// need a descriptor of its own and one to the upstream.
#[allow(unsafe_code)]
#[must_use]
pub fn connection_limit() -> usize {
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
    (descriptors.saturating_sub(RESERVED_DESCRIPTORS) / 2).clamp(1, MAX_CONNECTIONS)
}

/// Accepts clients until the end begins, then waits for those in flight, at most [`DRAIN_TIMEOUT`].
///
/// At the limit, new connections wait in the kernel's queue until an old one ends. They are not
/// refused: whoever holds the others may be done in a moment.
pub async fn run(listener: TcpListener, proxy: Rc<Proxy>, stop: Rc<Stop>, limit: usize) {
    let places = Arc::new(Semaphore::new(limit));
    let accepting = async {
        loop {
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            match listener.accept().await {
                Ok((stream, _)) => {
                    let (proxy, stop) = (Rc::clone(&proxy), Rc::clone(&stop));
                    tokio::task::spawn_local(async move {
                        connection::serve(stream, None, proxy, stop).await;
                        drop(place);
                    });
                }
                Err(error) if is_exhaustion(&error) => {
                    log::line(format_args!("cannot accept a connection: {error}; waiting"));
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
