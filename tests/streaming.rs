//! Nothing is held back: an event is with the client before the next is sent, a body's first byte with the upstream
//! before the second is there, and 500 streams at once arrive whole.

mod support;

use std::sync::{Arc, Barrier};
use support::*;

const EVENTS: usize = 50;

fn event(number: usize) -> String {
    format!("event: response.output_text.delta\ndata: {{\"delta\":\"{number}\"}}\n\n")
}

#[test]
fn each_event_is_with_the_client_before_the_next_is_sent() {
    let (arrived, told) = telling();
    let upstream = Upstream::start(move |exchange| {
        exchange.body()?;
        exchange.begin_events()?;
        for number in 0..EVENTS {
            // If the proxy held the head or the last event back, both ends would wait until the test fails.
            told.wait()?;
            exchange.chunk(event(number))?;
        }
        exchange.chunk("")
    });
    let folder = Folder::new();
    let dumping = Launch::to(&upstream).arg("--dump-dir");
    let dumping = dumping.arg(folder.join("dumps"));
    for launch in [Launch::to(&upstream), dumping] {
        let proxy = launch.start();
        let mut client = proxy.client();
        client.post("", "{}").unwrap();
        assert_eq!(client.head().unwrap().status(), 200);
        for number in 0..EVENTS {
            arrived.send(()).unwrap();
            let expected = event(number).into_bytes();
            let mut come = Vec::new();
            while come.len() < expected.len() {
                come.extend(client.piece().unwrap().expect("an event"));
            }
            assert_eq!(come, expected, "event {number}");
        }
        assert_eq!(client.piece().unwrap(), None, "the answer ends properly");
    }
}

#[test]
fn the_first_byte_of_a_slow_body_is_with_the_upstream_before_the_second() {
    let (tell, arrived) = telling();
    let (upstream, proxy) = serve(move |exchange| {
        while let Some(piece) = exchange.piece()? {
            tell.send(piece).unwrap();
        }
        ok(exchange)
    });
    for chunked in [false, true] {
        let mut client = proxy.client();
        let headers = ["Content-Length: 3\r\n", "Transfer-Encoding: chunked\r\n"];
        client.send_head(headers[usize::from(chunked)]).unwrap();
        for byte in ["a", "b", "c"] {
            match chunked {
                true => client.chunk(byte).unwrap(),
                false => client.send(byte).unwrap(),
            }
            assert_eq!(arrived.wait().unwrap(), byte.as_bytes(), "{chunked}");
        }
        client.send(if chunked { "0\r\n\r\n" } else { "" }).unwrap();
        assert_eq!(client.response().unwrap().status(), 200, "{chunked}");
    }
    let framings: Vec<_> = upstream.seen().iter().map(|seen| seen.framing).collect();
    assert_eq!(framings, [Framing::Length(3), Framing::Chunked]);
}

#[test]
fn five_hundred_streams_at_once_arrive_whole() {
    const STREAMS: usize = 500;
    raise_descriptor_limit(3000);

    // What only this request is answered with.
    let pieces = |request: &str| -> Vec<String> {
        let piece = |n: usize| format!("data: {request} {n} {}\n\n", "x".repeat(100 * n));
        (1..=16).map(piece).collect()
    };
    let all_open = Arc::new(Barrier::new(STREAMS));
    let (upstream, proxy) = serve(move |exchange| {
        let pieces = pieces(std::str::from_utf8(exchange.body()?).unwrap());
        exchange.begin_events()?;
        exchange.chunk(&pieces[0])?;
        // No stream goes on before every stream has begun.
        all_open.wait();
        let mut rest = pieces[1..].iter();
        rest.try_for_each(|piece| exchange.chunk(piece))?;
        exchange.chunk("")
    });
    let request = |number| format!("request {number}");
    let mut clients: Vec<_> = (0..STREAMS).map(|_| proxy.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.post("", request(number)).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let response = client.response().unwrap();
        assert_eq!(response.status(), 200);
        let whole = pieces(&request(number)).concat();
        assert!(response.body == whole.as_bytes(), "{number} is not whole");
    }
    assert_eq!(upstream.connections(), STREAMS);
}
