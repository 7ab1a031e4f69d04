//! Shutdown: streams in flight finish, new connections are refused, idle ones do not delay the exit, and a second signal
//! exits at once.

mod support;

use nix::sys::signal::Signal::{SIGCONT, SIGINT, SIGTERM};
use nix::unistd::geteuid;
use std::path::Path;
use std::{io::ErrorKind, net::TcpStream, sync::mpsc::Sender, time::Duration};
use support::*;

/// Whether this platform keeps the default action of a signal: only Linux shows whether it was ignored at startup.
fn keeps_default_action(trigger: &str) -> bool {
    !cfg!(target_os = "linux") && ["SIGHUP", "SIGQUIT"].contains(&trigger)
}

/// Whether an info file is removed. A program that was started as root has dropped root, and can only empty the file.
fn is_removed(info: &Path) -> bool {
    std::fs::read(info).is_ok_and(|text| geteuid().is_root() && text.is_empty()) || !info.exists()
}

fn wait_until_refused(proxy: &Proxy) {
    wait_until("connections are refused", || {
        let connection = TcpStream::connect(("127.0.0.1", proxy.port));
        connection.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    });
}

/// An upstream that starts a response at once and ends it when the test says so.
fn start_holding() -> (Upstream, Sender<()>) {
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

fn start_stream(proxy: &Proxy) -> Client {
    let mut client = proxy.client();
    client.send_post("", "hold").unwrap();
    assert_eq!(client.read_head().unwrap().status(), 200);
    assert_eq!(client.read_part().unwrap().unwrap(), b"data: 1\n\n");
    client
}

#[test]
fn streams_finish_others_close_and_the_port_is_free() {
    let port = unused_port().to_string();
    for trigger in ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "GET /shutdown"] {
        if keeps_default_action(trigger) {
            continue;
        }
        let (upstream, release) = start_holding();
        let command = ProxyCommand::for_upstream(&upstream).arg("--http-shutdown");
        // Connections of the previous process are in TIME_WAIT. The port must be usable anyway.
        let mut proxy = command.args(["--port", &port]).start();
        let mut stream = start_stream(&proxy);
        let mut idle = proxy.client();
        assert_eq!(idle.post_default().unwrap().status(), 200, "{trigger}");
        let mut fresh = proxy.client();

        proxy.trigger_shutdown(trigger);
        wait_until_refused(&proxy);
        for client in [&mut idle, &mut fresh] {
            let received = client.read_until_closed().unwrap();
            let is_served = received.starts_with(b"HTTP/1.1 2");
            assert!(!is_served, "{trigger}: {}", received.escape_ascii());
        }
        assert!(proxy.is_running(), "{trigger}: the stream is in flight");
        release.send(()).unwrap();
        let rest = stream.read_rest().unwrap();
        assert_eq!(rest, b"data: 2\n\n", "{trigger}: the stream is complete");
        assert_eq!(stream.read_until_closed().unwrap(), b"", "{trigger}");
        assert_eq!(proxy.wait().status.code(), Some(0), "{trigger}");
    }
}

#[test]
fn upload_in_flight_finishes_and_gets_its_response() {
    let (notify, arrived) = channel();
    let (upstream, proxy) = serve(move |request| {
        request.read_part()?;
        notify.send(()).unwrap();
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
    assert_eq!(connection, Some("close"), "no further request is accepted");
    assert_eq!(proxy.wait().status.code(), Some(0));
    assert_eq!(upstream.single_request().body, b"first-last");
}

#[test]
fn busy_and_starting_websockets_finish() {
    let (notify, arrived) = channel();
    let (release, released) = channel();
    let upstream = Upstream::start(move |request| {
        if request.header("x-case") == "starting" {
            notify.send(()).unwrap();
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
fn idle_clients_do_not_delay_shutdown() {
    // A new connection may take half a second to send a request. Waiting for a client would take seconds, up to 30.
    const IDLE_SHUTDOWN: Duration = Duration::from_millis(1500);
    let upstream = Upstream::start(ok);
    let post = "POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}";
    let proxy = ProxyCommand::for_upstream(&upstream).start();
    let mut clients = Vec::new();
    for _ in 0..5 {
        // The first one sends nothing.
        let mut six = [(); 6].map(|()| proxy.client());
        assert_eq!(six[1].post_default().unwrap().status(), 200);
        assert_eq!(six[2].status_of("GET /v1/models").unwrap(), 403);
        six[3].send(post).unwrap();
        assert_eq!(six[3].read_response().unwrap().status(), 403);
        assert_eq!(six[4].post_default().unwrap().status(), 200);
        for client in &mut six[4..] {
            client.send("POST /v1/responses HTTP/1.1\r\nHo").unwrap();
        }
        clients.extend(six);
    }
    // This response shows that all of them were accepted and their bytes read.
    assert_eq!(proxy.post_default().status(), 200);
    proxy.signal(SIGTERM);
    assert_eq!(proxy.wait_for(IDLE_SHUTDOWN).status.code(), Some(0));
    drop(clients);
}

#[test]
fn second_signal_exits_at_once() {
    for [first, second] in [
        ["SIGTERM", "SIGTERM"],
        ["SIGINT", "SIGINT"],
        ["SIGTERM", "SIGINT"],
        ["SIGHUP", "SIGQUIT"],
        ["GET /shutdown", "SIGTERM"],
    ] {
        if keeps_default_action(first) {
            continue;
        }
        let (upstream, _release) = start_holding();
        let dir = TestDir::new();
        let info = dir.join("info.json");
        let command = ProxyCommand::for_upstream(&upstream).arg("--http-shutdown");
        let mut proxy = command.arg("--server-info").arg(&info).start();
        let mut stream = start_stream(&proxy);
        assert!(info.exists());
        proxy.trigger_shutdown(first);
        wait_until_refused(&proxy);
        assert!(
            is_removed(&info),
            "{first}: the info file names a closed port"
        );
        let running = proxy.is_running();
        assert!(running, "{first}, {second}: the stream is in flight");
        proxy.trigger_shutdown(second);
        let run = proxy.wait();
        assert_ne!(run.status.code(), Some(0), "{first}, {second}: {run:?}");
        stream
            .read_rest()
            .expect_err("the stream must be truncated");
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
        assert!(is_removed(&info));
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
    // After a shutdown by one of them, this would be a second signal with another status.
    assert_eq!(proxy.stop().status.code(), Some(0));
}
