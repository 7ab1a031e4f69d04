//! Nothing is held back: an event is with the client before the next is sent, a body's first byte with the upstream
//! before the second is there, and 500 streams at once arrive whole.

mod support;

use std::sync::{Arc, Barrier, Mutex, mpsc};
use support::{
    PATIENCE,
    client::Client,
    http::Framing,
    proxy::Launch,
    raise_descriptor_limit,
    upstream::{Upstream, ok},
};

const EVENTS: usize = 50;

fn event(number: usize) -> String {
    format!("event: response.output_text.delta\ndata: {{\"delta\":\"{number}\"}}\n\n")
}

#[test]
fn each_event_is_with_the_client_before_the_next_is_sent() {
    let (arrived, next) = mpsc::channel::<()>();
    let next = Mutex::new(next);
    let upstream = Upstream::start(move |exchange| {
        exchange.body()?;
        exchange.begin_events()?;
        for number in 0..EVENTS {
            exchange.chunk(&event(number))?;
            // If the proxy held this event back, both ends would wait until the test fails.
            next.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        }
        exchange.chunk("")
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client.post("", b"{}").unwrap();
    assert_eq!(client.head().unwrap().status(), 200);
    for number in 0..EVENTS {
        let expected = event(number).into_bytes();
        let mut come = Vec::new();
        while come.len() < expected.len() {
            come.extend(client.piece().unwrap().expect("an event"));
        }
        assert_eq!(come, expected, "event {number}");
        arrived.send(()).unwrap();
    }
    assert_eq!(client.piece().unwrap(), None, "the answer ends properly");
}

#[test]
fn the_head_of_an_answer_is_with_the_client_before_its_first_event() {
    let (arrived, next) = mpsc::channel::<()>();
    let next = Mutex::new(next);
    let upstream = Upstream::start(move |exchange| {
        exchange.body()?;
        exchange.begin_events()?;
        next.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        exchange.chunk(&event(0))?;
        exchange.chunk("")
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client.post("", b"{}").unwrap();
    assert_eq!(client.head().unwrap().status(), 200);
    arrived.send(()).unwrap();
    assert_eq!(client.rest().unwrap(), event(0).into_bytes());
}

#[test]
fn the_first_byte_of_a_slow_body_is_with_the_upstream_before_the_second() {
    let framings = [
        (
            "a known length",
            "Content-Length: 3\r\n",
            ["a", "b", "c"],
            "",
        ),
        (
            "chunks",
            "Transfer-Encoding: chunked\r\n",
            ["1\r\na\r\n", "1\r\nb\r\n", "1\r\nc\r\n"],
            "0\r\n\r\n",
        ),
    ];
    let (seen, arrived) = mpsc::channel();
    let upstream = Upstream::start(move |exchange| {
        while let Some(piece) = exchange.piece()? {
            seen.send(piece).unwrap();
        }
        ok(exchange)
    });
    let proxy = Launch::to(&upstream).start();
    for (name, header, pieces, end) in framings {
        let mut client = Client::connect(proxy.port);
        let head = client.post_head(header);
        client.send(head).unwrap();
        for (piece, byte) in pieces.iter().zip(["a", "b", "c"]) {
            client.send(piece).unwrap();
            let come = arrived.recv_timeout(PATIENCE);
            let come = come.unwrap_or_else(|error| panic!("{name}: {byte} did not come: {error}"));
            assert_eq!(come, byte.as_bytes(), "{name}");
        }
        client.send(end).unwrap();
        assert_eq!(client.response().unwrap().status(), 200, "{name}");
    }
    let framings: Vec<_> = upstream.seen().iter().map(|seen| seen.framing).collect();
    assert_eq!(framings, [Framing::Length(3), Framing::Chunked]);
}

#[test]
fn a_client_that_reads_nothing_before_it_has_sent_all_gets_an_early_answer_whole() {
    // More than the sockets hold, so that the answer is stuck until the client reads, and the body if it had to wait
    // for that.
    const ANSWER: usize = 5_000_000;
    const BODY: usize = 40_000_000;
    // The upstream of this test can't do both at once either, and counts on its own socket to hold the rest.
    let limits = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap_or_default();
    if limits
        .split_whitespace()
        .last()
        .is_none_or(|most| most != "4194304")
    {
        let why = format!("sockets hold another amount here than 4 MiB: {limits:?}");
        return support::skip("a client that reads nothing before it has sent all", &why);
    }
    let upstream = Upstream::start(|exchange| {
        exchange.piece()?;
        exchange.send(format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {ANSWER}\r\n\r\n"
        ))?;
        exchange.send(vec![b'x'; ANSWER])?;
        exchange.body().map(drop)
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client.post("", &vec![b'x'; BODY]).unwrap();
    assert_eq!(client.response().unwrap().body.len(), ANSWER);
}

#[test]
fn five_hundred_streams_at_once_arrive_whole() {
    const STREAMS: usize = 500;
    const PIECES: usize = 16;
    raise_descriptor_limit(3000);

    /// What only this request is answered with.
    fn piece(request: &str, number: usize) -> String {
        format!(
            "data: {request} {number} {}\n\n",
            "x".repeat(100 * (number + 1))
        )
    }

    let all_open = Arc::new(Barrier::new(STREAMS));
    let upstream = Upstream::start(move |exchange| {
        let request = String::from_utf8(exchange.body()?.to_vec()).unwrap();
        exchange.begin_events()?;
        exchange.chunk(&piece(&request, 0))?;
        // No stream goes on before every stream has begun.
        all_open.wait();
        for number in 1..PIECES {
            exchange.chunk(&piece(&request, number))?;
        }
        exchange.chunk("")
    });
    let proxy = Launch::to(&upstream).start();
    let mut clients: Vec<_> = (0..STREAMS)
        .map(|number| {
            let mut client = Client::connect(proxy.port);
            client
                .post("", format!("request {number}").as_bytes())
                .unwrap();
            client
        })
        .collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let response = client.response().unwrap();
        let request = format!("request {number}");
        let expected: String = (0..PIECES).map(|number| piece(&request, number)).collect();
        assert_eq!(response.status(), 200);
        assert!(
            response.body == expected.into_bytes(),
            "{request} is not whole"
        );
    }
    assert_eq!(upstream.connections(), STREAMS);
}
