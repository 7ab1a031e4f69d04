//! systemd may hold the port and be told of beginning and end: no connection is lost, and no other socket is taken.

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

/// The program with these sockets passed to it as systemd does, from number 3 on (sd_listen_fds(3)).
fn activated(upstream: &Upstream, sockets: &[RawFd]) -> ProxyCommand {
    // What comes after a process's start and knows its number is a shell that becomes it.
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

/// The same socket under a number that is out of the way of those that are passed. It stays for as long as the test.
fn out_of_the_way(socket: &impl AsFd) -> RawFd {
    fcntl(socket, F_DUPFD_CLOEXEC(100)).unwrap()
}

/// A listening socket such as systemd holds, and its port.
fn listening() -> (RawFd, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (out_of_the_way(&listener), port)
}

#[test]
fn what_was_waiting_at_the_start_is_served_and_a_restart_loses_nothing() {
    let upstream = Upstream::start(ok);
    let (socket, port) = listening();
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
fn a_socket_that_accepts_no_more_is_no_reason_to_spin() {
    use nix::sys::socket::{Shutdown, shutdown};
    let upstream = Upstream::start(ok);
    let (socket, _) = listening();
    let mut proxy = activated(&upstream, &[socket]).start();
    let mut client = proxy.client();
    assert_eq!(client.post_default().unwrap().status(), 200);
    shutdown(socket, Shutdown::Both).unwrap();
    proxy.wait_for_line(|line| line.contains("cannot accept"));
    assert_idle(&proxy);
    assert_eq!(
        client.post_default().unwrap().status(),
        200,
        "who is in stays"
    );
    let run = proxy.stop();
    assert_eq!(run.status.code(), Some(0), "{run:?}");
}

#[test]
fn systemd_is_told_of_the_beginning_and_of_the_end() {
    let upstream = Upstream::start(ok);
    for end in ["SIGTERM", "SIGINT", "GET /shutdown"] {
        let dir = TestDir::new();
        let path = dir.join("notify");
        let notices = UnixDatagram::bind(&path).unwrap();
        // As systemd's own is: the program may have dropped root.
        fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
        notices.set_read_timeout(Some(TIMEOUT)).unwrap();
        let notice = || {
            let mut bytes = [0; 1000];
            let size = notices.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..size].to_vec()).unwrap()
        };
        let command = ProxyCommand::for_upstream(&upstream).arg("--http-shutdown");
        let mut proxy = command.env("NOTIFY_SOCKET", &path).open_stdin().spawn();
        // Not before it listens, which is not before it has the key.
        notices.set_nonblocking(true).unwrap();
        let early = notices.recv(&mut [0; 1]).unwrap_err();
        assert_eq!(early.kind(), ErrorKind::WouldBlock);
        notices.set_nonblocking(false).unwrap();
        let mut stdin = proxy.stdin.take().unwrap();
        stdin.write_all(b"sk-anything\n").unwrap();
        assert_eq!(notice().trim_end(), "READY=1", "{end}");
        proxy.wait_until_listening();
        proxy.trigger_shutdown(end);
        assert_eq!(proxy.wait().status.code(), Some(0), "{end}");
        notices.set_nonblocking(true).unwrap();
        assert_eq!(notice().trim_end(), "STOPPING=1", "{end}");
    }
}

#[test]
fn any_other_socket_than_one_that_listens_on_loopback_is_an_error() {
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
    let everywhere_6 = TcpListener::bind("[::]:0");
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let unix = UnixListener::bind(dir.join("socket")).unwrap();
    let (listens, port) = listening();
    let connected = Client::connect(port);
    let mut cases = vec![
        ("all addresses", out_of_the_way(&everywhere)),
        ("UDP", out_of_the_way(&udp)),
        ("a Unix socket", out_of_the_way(&unix)),
        ("a connection", out_of_the_way(connected.socket())),
        ("a file", out_of_the_way(&File::open(PROGRAM).unwrap())),
    ];
    match &everywhere_6 {
        Ok(socket) => cases.push(("all addresses, IPv6", out_of_the_way(socket))),
        Err(error) => skip("a socket on all addresses of IPv6", &error.to_string()),
    }
    for (name, socket) in cases {
        activated(&upstream, &[socket]).assert_startup_error(name, 1, &["LISTEN_FDS"]);
    }
    let two = activated(&upstream, &[listens, listening().0]);
    two.assert_startup_error("two sockets", 1, &["exactly one"]);
    for given in ["0", "8399", &port.to_string()] {
        let command = activated(&upstream, &[listens]).args(["--port", given]);
        command.assert_startup_error(given, 1, &["--port"]);
    }
    assert!(upstream.requests().is_empty());
}

#[test]
fn sockets_for_another_process_are_not_taken_and_a_notice_that_nobody_takes_is_only_logged() {
    let upstream = Upstream::start(ok);
    let nobody = TestDir::new().join("nobody");
    for count in ["1", "0"] {
        let command = ProxyCommand::for_upstream(&upstream).env("LISTEN_PID", "1");
        let command = command.env("NOTIFY_SOCKET", &nobody);
        let mut proxy = command.env("LISTEN_FDS", count).start();
        proxy.wait_for_line(|line| line.contains("systemd"));
        let lines = proxy.log.iter().filter(|line| line.contains("LISTEN_FDS"));
        assert_eq!(lines.count(), usize::from(count == "1"), "{count}");
        assert_eq!(proxy.post_default().status(), 200, "{count}");
    }
}
