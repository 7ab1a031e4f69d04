//! Stopping: streams in flight finish, nothing new begins, idle connections don't hold it up, and a second signal ends
//! it at once.

mod support;

use std::{
    io,
    net::TcpStream,
    sync::{Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};
use support::{
    PATIENCE,
    client::Client,
    free_port,
    proxy::{Launch, Proxy},
    upstream::{Upstream, ok},
};

/// The ways to ask for the end.
const WAYS: [&str; 3] = ["SIGTERM", "SIGINT", "GET /shutdown"];

/// Waits until new connections are refused.
fn wait_until_refused(port: u16) {
    let deadline = Instant::now() + PATIENCE;
    while !TcpStream::connect(("127.0.0.1", port))
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        assert!(Instant::now() < deadline, "connections are still accepted");
        thread::yield_now();
    }
}

/// An upstream whose answers begin at once and end when the test says so.
fn held() -> (Upstream, mpsc::Sender<()>) {
    let (go_on, held) = mpsc::channel();
    let held = Mutex::new(held);
    let upstream = Upstream::start(move |exchange| {
        if exchange.body()? != b"hold" {
            return ok(exchange);
        }
        exchange.begin_events()?;
        exchange.chunk("data: 1\n\n")?;
        held.lock()
            .unwrap()
            .recv_timeout(PATIENCE)
            .map_err(io::Error::other)?;
        exchange.chunk("data: 2\n\n")?;
        exchange.chunk("")
    });
    (upstream, go_on)
}

/// A client in the middle of a stream.
fn streaming(proxy: &Proxy) -> Client {
    let mut client = Client::connect(proxy.port);
    client.post("", b"hold").unwrap();
    assert_eq!(client.head().unwrap().status(), 200);
    assert_eq!(client.piece().unwrap().unwrap(), b"data: 1\n\n");
    client
}

#[test]
fn streams_in_flight_finish_while_all_else_ends() {
    for way in WAYS {
        let (upstream, go_on) = held();
        let mut proxy = Launch::to(&upstream).arg("--http-shutdown").start();
        let mut stream = streaming(&proxy);
        let mut idle = Client::connect(proxy.port);
        assert_eq!(idle.ask().unwrap().status(), 200, "{way}");
        let mut fresh = Client::connect(proxy.port);

        proxy.ask_to_stop(way);
        wait_until_refused(proxy.port);
        for (name, client) in [("idle", &mut idle), ("fresh", &mut fresh)] {
            let came = client.until_closed();
            let came = came.unwrap_or_else(|error| panic!("{way}: {name}: not closed: {error}"));
            assert!(
                !came.starts_with(b"HTTP/1.1 2"),
                "{way}: {name}: {}",
                came.escape_ascii()
            );
        }
        assert!(proxy.is_running(), "{way}: the stream is still in flight");
        go_on.send(()).unwrap();
        assert_eq!(
            stream.rest().unwrap(),
            b"data: 2\n\n",
            "{way}: the stream arrives whole"
        );
        assert_eq!(stream.until_closed().unwrap(), b"", "{way}");
        assert_eq!(proxy.wait().status.code(), Some(0), "{way}");
    }
}

#[test]
fn an_upload_in_flight_is_finished_and_answered() {
    let (there, arrived) = mpsc::channel();
    let upstream = Upstream::start(move |exchange| {
        exchange.piece()?;
        there.send(()).unwrap();
        ok(exchange)
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    let head = client.post_head("Content-Length: 10\r\n");
    client.send(head + "first").unwrap();
    arrived.recv_timeout(PATIENCE).unwrap();
    proxy.signal(libc::SIGTERM);
    wait_until_refused(proxy.port);
    client.send("-last").unwrap();
    let response = client.response().unwrap();
    assert_eq!(response.status(), 200);
    let connection = response.head.get("connection");
    assert_eq!(connection, Some("close"), "there is no next request");
    assert_eq!(proxy.wait().status.code(), Some(0));
    assert_eq!(upstream.only().body, b"first-last");
}

/// What a client does before the end begins.
type Begin<'a> = &'a dyn Fn(&mut Client);

/// How long the end may take where nothing is in flight: a connection that has sent nothing yet has half a second to
/// do so. Clients that were waited for would take seconds.
const SOON: Duration = Duration::from_millis(1500);

#[test]
fn clients_with_nothing_in_flight_that_never_leave_do_not_hold_it_up() {
    let upstream = Upstream::start(ok);
    let served = |client: &mut Client| assert_eq!(client.ask().unwrap().status(), 200);
    let refused = |client: &mut Client| {
        client
            .send("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        assert_eq!(client.response().unwrap().status(), 403);
    };
    let half = |client: &mut Client| client.send("POST /v1/responses HTTP/1.1\r\nHo").unwrap();
    let refused_with_a_body = |client: &mut Client| {
        client
            .send("POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
            .unwrap();
        assert_eq!(client.response().unwrap().status(), 403);
    };
    let cases: [(&str, Begin<'_>); 6] = [
        ("refused with a body", &refused_with_a_body),
        ("fresh", &|_| {}),
        ("served", &served),
        ("refused", &refused),
        ("half a first head", &half),
        ("half a second head", &|client| {
            served(client);
            half(client);
        }),
    ];
    let mut held_up = Vec::new();
    for (name, begin) in cases {
        let proxy = Launch::to(&upstream).start();
        let mut clients = [(); 5].map(|()| Client::connect(proxy.port));
        clients.iter_mut().for_each(begin);
        // Each has been accepted, and what it sent been read, before the last of them is answered.
        served(&mut Client::connect(proxy.port));
        proxy.signal(libc::SIGTERM);
        match proxy.ends_within(SOON) {
            true => assert_eq!(proxy.wait().status.code(), Some(0), "{name}"),
            false => held_up.push(name),
        }
        drop(clients);
    }
    assert!(
        held_up.is_empty(),
        "held up by clients that are {held_up:?}"
    );
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for [first, second] in [
        ["SIGTERM", "SIGTERM"],
        ["SIGINT", "SIGINT"],
        ["SIGTERM", "SIGINT"],
        ["GET /shutdown", "SIGTERM"],
    ] {
        let (upstream, _never) = held();
        let mut proxy = Launch::to(&upstream).arg("--http-shutdown").start();
        let mut stream = streaming(&proxy);
        proxy.ask_to_stop(first);
        wait_until_refused(proxy.port);
        assert!(
            proxy.is_running(),
            "{first}, {second}: the stream is still in flight"
        );
        proxy.ask_to_stop(second);
        let run = proxy.wait();
        assert_ne!(run.status.code(), Some(0), "{first}, {second}: {run:?}");
        stream.rest().expect_err("the stream is broken off");
    }
}

#[test]
fn the_port_can_be_bound_again_at_once() {
    let upstream = Upstream::start(ok);
    let port = free_port().to_string();
    for round in 0..3 {
        let proxy = Launch::to(&upstream).args(["--port", &port]).start();
        let mut client = Client::connect(proxy.port);
        assert_eq!(client.ask().unwrap().status(), 200);
        // The proxy closes this one first, so its end of it lingers in the kernel.
        let run = proxy.stop();
        assert_eq!(run.status.code(), Some(0), "round {round}: {run:?}");
        assert_eq!(client.until_closed().unwrap(), b"");
    }
}

#[test]
#[ignore = "it takes the 30 seconds that it is about"]
fn a_stream_that_does_not_end_is_broken_off_after_30_seconds() {
    let (there, arrived) = mpsc::channel();
    let upstream = Upstream::start(move |exchange| {
        exchange.body()?;
        exchange.begin_events()?;
        exchange.chunk("data: 1\n\n")?;
        // A read gives up after less than that, so once more.
        let left = exchange
            .wait_until_left()
            .or_else(|_| exchange.wait_until_left());
        there.send(left.is_ok()).unwrap();
        Ok(())
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = streaming(&proxy);
    proxy.signal(libc::SIGTERM);
    assert_eq!(arrived.recv_timeout(PATIENCE * 2), Ok(true));
    assert_eq!(proxy.wait().status.code(), Some(0));
    client.rest().expect_err("the stream is broken off");
}
