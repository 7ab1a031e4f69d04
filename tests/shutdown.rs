//! Stopping: streams in flight finish, nothing new begins, idle connections don't hold it up, and a second signal ends
//! it at once.

mod support;

use nix::sys::signal::Signal::{SIGCONT, SIGINT, SIGTERM};
use nix::unistd::geteuid;
use std::path::Path;
use std::{io::ErrorKind, net::TcpStream, sync::mpsc::Sender, time::Duration};
use support::*;

/// Whether the program leaves a signal alone, since the system does not tell whether it was ignored at startup.
fn is_default_here(way: &str) -> bool {
    !cfg!(target_os = "linux") && ["SIGHUP", "SIGQUIT"].contains(&way)
}

/// Whether an info file names no port any more. Started as root, the program has left root by then and can
/// only empty the file.
fn is_gone(info: &Path) -> bool {
    std::fs::read(info).is_ok_and(|text| geteuid().is_root() && text.is_empty()) || !info.exists()
}

fn wait_until_refused(proxy: &Proxy) {
    wait_until("connections are refused", || {
        let connection = TcpStream::connect(("127.0.0.1", proxy.port));
        connection.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
}

/// An upstream whose answers begin at once and end when the test says so.
fn holding() -> (Upstream, Sender<()>) {
    let (release, released) = channel();
    let upstream = Upstream::start(move |request| {
        if request.read_body()? != b"hold" {
            return ok(request);
        }
        request.start_events()?;
        request.chunk("data: 1\n\n")?;
        released.recv()?;
        request.chunk("data: 2\n\n")?;
        request.chunk("")
    });
    (upstream, release)
}

fn streaming(proxy: &Proxy) -> Client {
    let mut client = proxy.client();
    client.send_post("", "hold").unwrap();
    assert_eq!(client.read_head().unwrap().status(), 200);
    assert_eq!(client.read_part().unwrap().unwrap(), b"data: 1\n\n");
    client
}

#[test]
fn streams_in_flight_finish_while_all_else_ends_and_the_port_can_be_bound_again() {
    let port = unused_port().to_string();
    for way in ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "GET /shutdown"] {
        if is_default_here(way) {
            continue;
        }
        let (upstream, release) = holding();
        let command = ProxyCommand::for_upstream(&upstream).arg("--http-shutdown");
        // The last one closed connections first, so its end of them lingers in the kernel: the port is free at once.
        let mut proxy = command.args(["--port", &port]).start();
        let mut stream = streaming(&proxy);
        let mut idle = proxy.client();
        assert_eq!(idle.post_default().unwrap().status(), 200, "{way}");
        let mut fresh = proxy.client();

        proxy.trigger_shutdown(way);
        wait_until_refused(&proxy);
        for client in [&mut idle, &mut fresh] {
            let received = client.read_until_closed().unwrap();
            let answered = received.starts_with(b"HTTP/1.1 2");
            assert!(!answered, "{way}: {}", received.escape_ascii());
        }
        assert!(proxy.is_running(), "{way}: the stream is still in flight");
        release.send(()).unwrap();
        let rest = stream.read_rest().unwrap();
        assert_eq!(rest, b"data: 2\n\n", "{way}: the stream arrives whole");
        assert_eq!(stream.read_until_closed().unwrap(), b"", "{way}");
        assert_eq!(proxy.wait().status.code(), Some(0), "{way}");
    }
}

#[test]
fn an_upload_in_flight_is_finished_and_answered() {
    let (tell, arrived) = channel();
    let (upstream, proxy) = serve(move |request| {
        request.read_part()?;
        tell.send(()).unwrap();
        ok(request)
    });
    let mut client = proxy.client();
    let head = client.post_head("Content-Length: 10\r\n");
    client.send(head + "first").unwrap();
    arrived.recv().unwrap();
    proxy.signal(SIGTERM);
    wait_until_refused(&proxy);
    client.send("-last").unwrap();
    let response = client.read_response().unwrap();
    assert_eq!(response.status(), 200);
    let connection = response.head.get("connection");
    assert_eq!(connection, Some("close"), "there is no next request");
    assert_eq!(proxy.wait().status.code(), Some(0));
    assert_eq!(upstream.single_request().body, b"first-last");
}

#[test]
fn shutdown_lets_busy_and_starting_websockets_finish() {
    let (tell, arrived) = channel();
    let (release, released) = channel();
    let upstream = Upstream::start(move |request| {
        if request.header("x-case") == "starting" {
            tell.send(()).unwrap();
            released.recv()?;
        }
        echo_tunnel(request)
    });
    let mut proxy = start_with_websocket(&upstream);
    let busy = open_tunnel(&proxy, "");
    let mut starting = proxy.client();
    let head = handshake("X-Case: starting\r\n");
    starting.send(head).unwrap();
    arrived.recv().unwrap();
    proxy.signal(SIGTERM);
    wait_until_refused(&proxy);
    release.send(()).unwrap();
    assert_eq!(starting.read_head().unwrap().status(), 101);
    for mut client in [busy, starting] {
        for _ in 0..3 {
            client.send("more").unwrap();
            assert_eq!(client.read_bytes(4).unwrap(), b"more");
        }
        assert!(proxy.is_running());
        client.shutdown_write();
        assert_eq!(client.read_until_closed().unwrap(), b"");
        let line = proxy.wait_for_request("request ", &[" status=101 ", " in=12 out=12"]);
        assert!(!line.contains("error="), "{line}");
    }
    assert_eq!(proxy.wait().status.code(), Some(0));
}

#[test]
fn clients_with_nothing_in_flight_that_never_leave_do_not_hold_it_up() {
    // A connection that has sent nothing yet has half a second to do so. Clients that were waited for would take
    // seconds, up to thirty.
    const SOON: Duration = Duration::from_millis(1500);
    let upstream = Upstream::start(ok);
    let post = "POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}";
    let proxy = ProxyCommand::for_upstream(&upstream).start();
    let mut clients = Vec::new();
    for _ in 0..5 {
        // The first one stays fresh.
        let mut six = [(); 6].map(|()| proxy.client());
        assert_eq!(six[1].post_default().unwrap().status(), 200);
        assert_eq!(six[2].status_of("GET /v1/models").unwrap(), 403);
        six[3].send(post).unwrap();
        assert_eq!(six[3].read_response().unwrap().status(), 403);
        assert_eq!(six[4].post_default().unwrap().status(), 200);
        for half in &mut six[4..] {
            half.send("POST /v1/responses HTTP/1.1\r\nHo").unwrap();
        }
        clients.extend(six);
    }
    // Each has been accepted, and what it sent been read, before the last of them is answered.
    assert_eq!(proxy.post_default().status(), 200);
    proxy.signal(SIGTERM);
    assert_eq!(proxy.wait_for(SOON).status.code(), Some(0));
    drop(clients);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for [first, second] in [
        ["SIGTERM", "SIGTERM"],
        ["SIGINT", "SIGINT"],
        ["SIGTERM", "SIGINT"],
        ["SIGHUP", "SIGQUIT"],
        ["GET /shutdown", "SIGTERM"],
    ] {
        if is_default_here(first) {
            continue;
        }
        let (upstream, _never) = holding();
        let dir = TestDir::new();
        let info = dir.join("info.json");
        let command = ProxyCommand::for_upstream(&upstream).arg("--http-shutdown");
        let mut proxy = command.arg("--server-info").arg(&info).start();
        let mut stream = streaming(&proxy);
        assert!(info.exists());
        proxy.trigger_shutdown(first);
        wait_until_refused(&proxy);
        assert!(is_gone(&info), "{first}: it names a port that refuses");
        let running = proxy.is_running();
        assert!(running, "{first}, {second}: the stream is still in flight");
        proxy.trigger_shutdown(second);
        let run = proxy.wait();
        assert_ne!(run.status.code(), Some(0), "{first}, {second}: {run:?}");
        stream.read_rest().expect_err("the stream is broken off");
    }
}

#[test]
fn info_file_is_removed_by_two_signals_at_once() {
    for _ in 0..5 {
        let dir = TestDir::new();
        let info = dir.join("info.json");
        let proxy = ProxyCommand::new().arg("--server-info").arg(&info).start();
        // Both are pending when the program runs again.
        proxy.freeze();
        for signal in [SIGTERM, SIGINT, SIGCONT] {
            proxy.signal(signal);
        }
        proxy.wait();
        assert!(is_gone(&info));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn signals_ignored_at_startup_do_not_shut_down() {
    use nix::sys::signal::Signal::{SIGHUP, SIGQUIT};
    let mut shell = std::process::Command::new("/bin/sh");
    shell.args(["-c", "trap '' HUP QUIT; exec \"$@\"", "sh", PROGRAM]);
    let upstream = Upstream::start(ok);
    let command = ProxyCommand::from_command(shell).url(&upstream.url());
    let proxy = command.trust(&upstream).start();
    for signal in [SIGHUP, SIGQUIT] {
        proxy.signal(signal);
        assert_eq!(proxy.post_default().status(), 200, "{signal}");
    }
    // If it had shut down for one of them, this would be the second signal.
    assert_eq!(proxy.stop().status.code(), Some(0));
}
