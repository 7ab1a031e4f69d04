//! Only loopback counts: peers and upstreams with other addresses are disconnected, whatever their name.

#![cfg(target_os = "linux")]

mod support;

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use support::*;

/// Runs a test in a new network namespace. Its loopback device has the addresses 127.0.0.1 and 192.0.2.1. Requires root.
fn in_network_namespace(what: &'static str, run: fn(&str)) {
    if !require_root(what) {
        return;
    }
    let outcome = thread::spawn(move || {
        let unshared = unshare(CloneFlags::CLONE_NEWNET);
        unshared.map_err(|error| format!("no network namespaces: {error}"))?;
        for words in ["link set lo up", "addr add 192.0.2.1/32 dev lo"] {
            let done = Command::new("ip").args(words.split(' ')).status();
            let done = done.is_ok_and(|status| status.success());
            done.then_some(()).ok_or("no `ip` (iproute2)")?;
        }
        run(what);
        Ok::<_, String>(())
    });
    if let Err(why) = outcome.join().unwrap() {
        skip(what, &why);
    }
}

#[test]
fn peer_with_another_address_is_disconnected() {
    in_network_namespace("a peer with another address", |_| {
        let upstream = Upstream::start(ok);
        let proxy = ProxyCommand::for_upstream(&upstream).start();
        // With the sysctl `route_localnet`, neighbours can connect like this.
        let (kind, close) = (SockType::Stream, SockFlag::SOCK_CLOEXEC);
        let neighbour = socket(AddressFamily::Inet, kind, close, None).unwrap();
        bind(neighbour.as_raw_fd(), &SockaddrIn::new(192, 0, 2, 1, 0)).unwrap();
        let to = SockaddrIn::new(127, 0, 0, 1, proxy.port);
        connect(neighbour.as_raw_fd(), &to).unwrap();
        let mut neighbour = TcpStream::from(neighbour);
        neighbour.set_read_timeout(Some(TIMEOUT)).unwrap();
        let _ = neighbour.write_all(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let mut received = Vec::new();
        let end = neighbour.read_to_end(&mut received);
        assert!(end.as_ref().err().is_none_or(is_closed), "{end:?}");
        assert_eq!(received, b"");
        assert_eq!(proxy.post_default().status(), 200);
        assert_eq!(upstream.requests().len(), 1);
    });
}

#[test]
fn localhost_with_another_address_gets_nothing() {
    in_network_namespace("a localhost with another address", |what| {
        let listener = TcpListener::bind("192.0.2.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let url = format!("http://localhost:{port}/");
        let dir = TestDir::new();
        let hosts = dir.join("hosts");
        fs::write(&hosts, "192.0.2.1 localhost\n").unwrap();
        let mounts = vec![Mount::File(hosts, "/etc/hosts".into())];
        let Some(mut proxy) = start_with_mounts(what, ProxyCommand::new().url(&url), mounts) else {
            return;
        };
        assert_eq!(proxy.post_default().status(), 502);
        let words = ["status=502", "is not a loopback address"];
        proxy.wait_for_request("request ", &words);
        let mut received = Vec::new();
        let end = listener.accept().unwrap().0.read_to_end(&mut received);
        assert!(end.as_ref().err().is_none_or(is_closed), "{end:?}");
        assert_eq!(received, b"");
    });
}
