//! systemd socket activation and readiness notification: restarts lose no connection, and unsuitable sockets are
//! rejected.

mod support;

use nix::fcntl::{FcntlArg::F_DUPFD_CLOEXEC, fcntl};
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::process::Command;
use support::*;

/// The program with these sockets as descriptors 3 and up, as systemd passes them (sd_listen_fds(3)).
fn activated(upstream: &Upstream, sockets: &[RawFd]) -> ProxyCommand {
    // `LISTEN_PID` is known only after the fork, so a shell sets it before `exec`.
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh", PROGRAM]);
    let sockets = sockets.to_vec();
    ProxyCommand::from_command(shell)
        .url(&upstream.url())
        .trust(upstream)
        .env("LISTEN_FDS", sockets.len().to_string())
        .pre_exec(move || {
            let mut numbers = (3..).zip(&sockets);
            numbers.try_for_each(|(number, &socket)| support::dup2(socket, number))
        })
}

/// Duplicates a socket to a descriptor above those that are passed. It stays open until the end of the test.
fn dup_high(socket: &impl AsFd) -> RawFd {
    fcntl(socket, F_DUPFD_CLOEXEC(100)).unwrap()
}

/// A listening socket, and its port.
fn listen() -> (RawFd, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (dup_high(&listener), port)
}

#[test]
fn restart_serves_connections_queued_in_the_socket() {
    let upstream = Upstream::start(ok);
    let (socket, port) = listen();
    for round in 0..3 {
        let mut waiting = [(); 10].map(|()| Client::connect(port));
        for client in &mut waiting {
            client.send_post("", "{}").unwrap();
        }
        let proxy = activated(&upstream, &[socket]).start();
        assert_eq!(proxy.port, port);
        for client in &mut waiting {
            assert_eq!(
                client.read_response().unwrap().status(),
                200,
                "round {round}"
            );
        }
        assert_eq!(proxy.post_default().status(), 200);
        assert_eq!(proxy.stop().status.code(), Some(0), "round {round}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn accept_error_does_not_busy_loop() {
    use nix::sys::socket::{Shutdown, shutdown};
    let upstream = Upstream::start(ok);
    let (socket, _) = listen();
    let mut proxy = activated(&upstream, &[socket]).start();
    let mut client = proxy.client();
    assert_eq!(client.post_default().unwrap().status(), 200);
    shutdown(socket, Shutdown::Both).unwrap();
    proxy.wait_for_line(|line| line.contains("cannot accept"));
    assert_idle(&proxy);
    assert_eq!(
        client.post_default().unwrap().status(),
        200,
        "open connections stay open"
    );
    let run = proxy.stop();
    assert_eq!(run.status.code(), Some(0), "{run:?}");
}

#[test]
fn systemd_is_notified_of_readiness_and_shutdown() {
    let upstream = Upstream::start(ok);
    for trigger in ["SIGTERM", "SIGINT", "GET /shutdown"] {
        let dir = TestDir::new();
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        // Writable for all, like systemd's own socket: the program may have dropped root.
        fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let receive = || {
            let mut bytes = [0; 1000];
            let size = socket.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..size].to_vec()).unwrap()
        };
        let command = ProxyCommand::for_upstream(&upstream).arg("--http-shutdown");
        let mut proxy = command.env("NOTIFY_SOCKET", &path).open_stdin().spawn();
        // Readiness must wait until the program listens, and it listens only once it has the key.
        socket.set_nonblocking(true).unwrap();
        let early = socket.recv(&mut [0; 1]).unwrap_err();
        assert_eq!(early.kind(), ErrorKind::WouldBlock);
        socket.set_nonblocking(false).unwrap();
        let mut stdin = proxy.stdin.take().unwrap();
        stdin.write_all(b"sk-anything\n").unwrap();
        assert_eq!(receive().trim_end(), "READY=1", "{trigger}");
        proxy.wait_until_listening();
        proxy.trigger_shutdown(trigger);
        assert_eq!(proxy.wait().status.code(), Some(0), "{trigger}");
        socket.set_nonblocking(true).unwrap();
        assert_eq!(receive().trim_end(), "STOPPING=1", "{trigger}");
    }
}

#[test]
fn rejects_sockets_that_do_not_listen_on_loopback() {
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
    let everywhere_6 = TcpListener::bind("[::]:0");
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let unix = UnixListener::bind(dir.join("socket")).unwrap();
    let (listener, port) = listen();
    let connected = Client::connect(port);
    let mut cases = vec![
        ("all addresses", dup_high(&everywhere)),
        ("UDP", dup_high(&udp)),
        ("Unix socket", dup_high(&unix)),
        ("connection", dup_high(connected.socket())),
        ("file", dup_high(&File::open(PROGRAM).unwrap())),
    ];
    match &everywhere_6 {
        Ok(socket) => cases.push(("all addresses, IPv6", dup_high(socket))),
        Err(error) => skip("a socket on all addresses of IPv6", &error.to_string()),
    }
    for (name, socket) in cases {
        activated(&upstream, &[socket]).assert_startup_error(name, 1, &["LISTEN_FDS"]);
    }
    let two = activated(&upstream, &[listener, listen().0]);
    two.assert_startup_error("two sockets", 1, &["exactly one"]);
    assert!(upstream.requests().is_empty());
}

#[test]
fn rejects_a_port_flag_next_to_an_inherited_socket() {
    let upstream = Upstream::start(ok);
    let (listener, port) = listen();
    for value in ["0", "8399", &port.to_string()] {
        let command = activated(&upstream, &[listener]).args(["--port", value]);
        command.assert_startup_error(value, 1, &["--port"]);
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn foreign_sockets_and_a_missing_notify_socket_are_logged() {
    let upstream = Upstream::start(ok);
    let missing = TestDir::new().join("missing");
    for count in ["1", "0"] {
        let command = ProxyCommand::for_upstream(&upstream).env("LISTEN_PID", "1");
        let command = command.env("NOTIFY_SOCKET", &missing);
        let mut proxy = command.env("LISTEN_FDS", count).start();
        proxy.wait_for_line(|line| line.contains("systemd"));
        let lines = proxy.log.iter().filter(|line| line.contains("LISTEN_FDS"));
        assert_eq!(lines.count(), usize::from(count == "1"), "{count}");
        assert_eq!(proxy.post_default().status(), 200, "{count}");
    }
}
