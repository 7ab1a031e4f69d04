//! A plain upstream gets the key only if its socket belongs to root, the starting user or `--upstream-user`: any local
//! user can listen on a loopback port.

#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use support::*;

/// A UID without a name.
const STRANGER: u32 = 3_900_301;

/// Sends a request through a proxy with these arguments to `listener`. Returns the status and what `listener` received.
///
/// `listener` accepts the connection either at once or only after the response.
fn request(
    listener: &TcpListener,
    host: &str,
    args: &[&str],
    accepts_early: bool,
) -> (u16, String) {
    let port = listener.local_addr().unwrap().port();
    let command = ProxyCommand::new().url(&format!("http://{host}:{port}/"));
    let mut proxy = command.args(args).start();
    let accept = || {
        as_user(STRANGER, || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            let mut received = vec![0; 4096];
            let count = stream.read(&mut received).unwrap_or(0);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}");
            String::from_utf8_lossy(&received[..count]).into_owned()
        })
    };
    std::thread::scope(|scope| {
        let early = accepts_early.then(|| scope.spawn(accept));
        let response = proxy.post_default();
        if response.status() == 502 {
            let message = response.error_message();
            assert!(message.contains("(owner)"), "{host}: {message}");
            let uid = format!("uid={STRANGER}; ");
            proxy.wait_for_request("request ", &["status=502", &uid, "--upstream-user"]);
        }
        let received = early.map_or_else(accept, |early| early.join().unwrap());
        (response.status(), received)
    })
}

#[test]
fn listener_of_another_user_gets_no_key() {
    if !require_root("an upstream of another user") {
        return;
    }
    for (address, host) in [
        ("127.0.0.1:0", "127.0.0.1"),
        ("127.0.0.1:0", "localhost"),
        ("0.0.0.0:0", "127.0.0.1"),
        ("[::]:0", "127.0.0.1"),
        ("[::1]:0", "[::1]"),
    ] {
        let Ok(listener) = as_user(STRANGER, || TcpListener::bind(address)) else {
            skip(address, "no IPv6 here");
            continue;
        };
        for accepts_early in [false, true] {
            let outcome = request(&listener, host, &[], accepts_early);
            assert_eq!(outcome, (502, String::new()), "{address}, {accepts_early}");
        }
    }
}

#[test]
fn listener_of_the_upstream_user_gets_the_key() {
    if !require_root("an upstream of another user") {
        return;
    }
    let listener = as_user(STRANGER, || TcpListener::bind("127.0.0.1:0")).unwrap();
    let args = ["--upstream-user", &STRANGER.to_string()];
    let (status, received) = request(&listener, "127.0.0.1", &args, true);
    assert_eq!(status, 200);
    assert!(received.contains(KEY), "{received}");
}

#[test]
fn other_users_listener_on_ipv6_loopback_gets_no_key() {
    let what = "an upstream on one of two loopback addresses";
    let dir = TestDir::new();
    let hosts = dir.join("hosts");
    fs::write(&hosts, "::1 localhost\n127.0.0.1 localhost\n").unwrap();
    let mounts = vec![Mount::File(hosts, "/etc/hosts".into())];
    let upstream = Upstream::start_plain(ok);
    let command = ProxyCommand::for_upstream(&upstream);
    let Some(proxy) = start_with_mounts(what, command, mounts) else {
        return;
    };
    let address = ("::1", upstream.port);
    let Ok(stranger) = as_user(STRANGER, || TcpListener::bind(address)) else {
        return skip(what, "no IPv6 here");
    };
    assert_eq!(proxy.post_default().status(), 502);
    let mut received = Vec::new();
    stranger
        .accept()
        .unwrap()
        .0
        .read_to_end(&mut received)
        .unwrap();
    assert_eq!(received, b"");
}
