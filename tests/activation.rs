//! systemd may hold the port and be told of beginning and end: no connection is lost, and no other socket is taken.

mod support;

use std::{
    io,
    net::{TcpListener, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::{UnixDatagram, UnixListener},
        unix::process::CommandExt,
    },
    process::Command,
};
use support::{
    Folder, PATIENCE,
    client::Client,
    proxy::{Finished, Launch, PROGRAM},
    upstream::{Upstream, ok},
};

/// Where passed sockets begin (sd_listen_fds(3)).
const FIRST: RawFd = 3;

/// The program with these sockets passed to it as systemd does.
fn activated<'a>(upstream: &Upstream, sockets: impl IntoIterator<Item = &'a OwnedFd>) -> Launch {
    let sockets: Vec<_> = sockets.into_iter().map(AsRawFd::as_raw_fd).collect();
    // What comes after a process's start and knows its number is a shell that becomes it.
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh", PROGRAM])
        .env("LISTEN_FDS", sockets.len().to_string());
    let pass = move || {
        for (number, &socket) in (FIRST..).zip(&sockets) {
            // SAFETY: the call takes integers; what was open at `number` is nothing that the program needs.
            #[allow(unsafe_code)]
            let result = unsafe { libc::dup2(socket, number) };
            if result < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls only.
    #[allow(unsafe_code)]
    unsafe {
        shell.pre_exec(pass);
    }
    let launch = Launch::of(shell).args(["--upstream-url", &upstream.url()]);
    launch
        .arg("--upstream-ca")
        .arg(upstream.authority().unwrap())
}

/// The same socket under a number that is out of the way of those that are passed.
fn out_of_the_way(socket: &impl AsRawFd) -> OwnedFd {
    // SAFETY: `fcntl` takes integers here, and the new descriptor is nobody else's.
    #[allow(unsafe_code)]
    unsafe {
        let number = libc::fcntl(socket.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 100);
        assert!(number >= 100, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(number)
    }
}

/// A listening socket such as systemd holds, and its port.
fn listening() -> (OwnedFd, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (out_of_the_way(&listener), port)
}

#[test]
fn what_was_waiting_at_the_start_is_served_and_a_restart_loses_nothing() {
    let upstream = Upstream::start(ok);
    let (socket, port) = listening();
    for round in 0..3 {
        let mut waiting: Vec<_> = (0..10)
            .map(|_| {
                let mut client = Client::connect(port);
                client.post("", b"{}").unwrap();
                client
            })
            .collect();
        let proxy = activated(&upstream, [&socket]).start();
        assert_eq!(proxy.port, port);
        for client in &mut waiting {
            assert_eq!(client.response().unwrap().status(), 200, "round {round}");
        }
        assert_eq!(Client::connect(port).ask().unwrap().status(), 200);
        assert_eq!(proxy.stop().status.code(), Some(0), "round {round}");
    }
}

#[test]
fn systemd_is_told_of_the_beginning_and_of_the_end() {
    let upstream = Upstream::start(ok);
    for end in ["SIGTERM", "SIGINT", "GET /shutdown"] {
        let folder = Folder::new();
        let path = folder.join("notify");
        let notices = UnixDatagram::bind(&path).unwrap();
        notices.set_read_timeout(Some(PATIENCE)).unwrap();
        let notice = || {
            let mut bytes = [0; 1000];
            let size = notices.recv(&mut bytes).unwrap();
            String::from_utf8(bytes[..size].to_vec()).unwrap()
        };
        let mut proxy = Launch::to(&upstream)
            .arg("--http-shutdown")
            .env("NOTIFY_SOCKET", &path)
            .input_later()
            .spawn();
        // Not before it listens, which is not before it has the key.
        notices.set_nonblocking(true).unwrap();
        let early = notices.recv(&mut [0; 1]).unwrap_err();
        assert_eq!(early.kind(), io::ErrorKind::WouldBlock);
        notices.set_nonblocking(false).unwrap();
        let mut stdin = proxy.stdin.take().unwrap();
        io::Write::write_all(&mut stdin, b"sk-anything\n").unwrap();
        assert_eq!(notice().trim_end(), "READY=1", "{end}");
        proxy.wait_until_listening();
        proxy.ask_to_stop(end);
        assert_eq!(proxy.wait().status.code(), Some(0), "{end}");
        notices.set_nonblocking(true).unwrap();
        assert_eq!(notice().trim_end(), "STOPPING=1", "{end}");
    }
}

#[test]
fn a_notice_that_nobody_takes_is_logged_and_no_more() {
    let upstream = Upstream::start(ok);
    let folder = Folder::new();
    let mut proxy = Launch::to(&upstream)
        .env("NOTIFY_SOCKET", folder.join("nobody"))
        .start();
    proxy.wait_for_line(|line| line.contains("systemd"));
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
}

/// The program says in one sentence with this word what is wrong.
fn assert_one_sentence(name: &str, run: &Finished, word: &str) {
    assert_eq!(run.status.code(), Some(1), "{name}: {run:?}");
    let [line] = run.stderr.as_slice() else {
        panic!("{name}: not one line: {run:?}");
    };
    assert!(
        line.starts_with("codex-responses-api-proxy: ") && line.contains(word),
        "{name}: {line}"
    );
}

#[test]
fn any_other_socket_than_one_that_listens_on_loopback_is_an_error() {
    let upstream = Upstream::start(ok);
    let folder = Folder::new();
    let everywhere = out_of_the_way(&TcpListener::bind("0.0.0.0:0").unwrap());
    let everywhere_6 = TcpListener::bind("[::]:0").map(|socket| out_of_the_way(&socket));
    let udp = out_of_the_way(&UdpSocket::bind("127.0.0.1:0").unwrap());
    let unix = out_of_the_way(&UnixListener::bind(folder.join("socket")).unwrap());
    let (listens, port) = listening();
    let connected = out_of_the_way(Client::connect(port).socket());
    let file = out_of_the_way(&std::fs::File::open(PROGRAM).unwrap());
    for (name, socket) in [
        ("all addresses", Some(&everywhere)),
        ("all addresses, IPv6", everywhere_6.as_ref().ok()),
        ("UDP", Some(&udp)),
        ("a Unix socket", Some(&unix)),
        ("a connection", Some(&connected)),
        ("a file", Some(&file)),
    ] {
        match socket {
            Some(socket) => {
                let run = activated(&upstream, [socket]).finish();
                assert_one_sentence(name, &run, "LISTEN_FDS");
            }
            None => support::skip(name, "no IPv6 here"),
        }
    }
    let (second, _) = listening();
    let two = activated(&upstream, [&listens, &second]).finish();
    assert_one_sentence("two sockets", &two, "exactly one");
    for given in ["0", "8399", &port.to_string()] {
        let launch = activated(&upstream, [&listens]).args(["--port", given]);
        assert_one_sentence(given, &launch.finish(), "--port");
    }
    assert!(upstream.seen().is_empty());
}

#[test]
fn sockets_for_another_process_are_not_taken() {
    let upstream = Upstream::start(ok);
    for (name, variables) in [
        ("of a parent", [("LISTEN_PID", "1"), ("LISTEN_FDS", "1")]),
        ("none", [("LISTEN_PID", "1"), ("LISTEN_FDS", "0")]),
    ] {
        let mut launch = Launch::to(&upstream);
        for (variable, value) in variables {
            launch = launch.env(variable, value);
        }
        let run = launch.start();
        assert_eq!(
            Client::connect(run.port).ask().unwrap().status(),
            200,
            "{name}"
        );
    }
}
