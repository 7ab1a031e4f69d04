//! Nothing is held back: an event is with the client before the next is sent, a body's first byte with the upstream
//! before the second is there, and 500 streams at once arrive whole. Who leaves ends the upstream's work at once.

mod support;

use std::{io, sync::Barrier};
use support::*;

const EVENTS: usize = 50;

fn event(number: usize) -> String {
    format!("event: response.output_text.delta\ndata: {{\"delta\":\"{number}\"}}\n\n")
}

#[test]
fn each_event_is_with_the_client_before_the_next_is_sent() {
    let (arrived, told) = channel();
    let upstream = Upstream::start(move |request| {
        request.read_body()?;
        request.start_events()?;
        for number in 0..EVENTS {
            // If the proxy held the head or the last event back, both ends would wait until the test fails.
            told.recv()?;
            request.chunk(event(number))?;
        }
        request.chunk("")
    });
    let dir = TestDir::new();
    let dumping = ProxyCommand::for_upstream(&upstream).arg("--dump-dir");
    let dumping = dumping.arg(dir.join("dumps"));
    for command in [ProxyCommand::for_upstream(&upstream), dumping] {
        let proxy = command.start();
        let mut client = proxy.client();
        client.send_post("", "{}").unwrap();
        assert_eq!(client.read_head().unwrap().status(), 200);
        for number in 0..EVENTS {
            arrived.send(()).unwrap();
            let expected = event(number).into_bytes();
            let mut come = Vec::new();
            while come.len() < expected.len() {
                come.extend(client.read_part().unwrap().expect("an event"));
            }
            assert_eq!(come, expected, "event {number}");
        }
        assert_eq!(
            client.read_part().unwrap(),
            None,
            "the answer ends properly"
        );
    }
}

#[test]
fn the_first_byte_of_a_slow_body_is_with_the_upstream_before_the_second() {
    let (tell, arrived) = channel();
    let (upstream, proxy) = serve(move |request| {
        while let Some(piece) = request.read_part()? {
            tell.send(piece).unwrap();
        }
        ok(request)
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
            assert_eq!(arrived.recv().unwrap(), byte.as_bytes(), "{chunked}");
        }
        client.send(if chunked { "0\r\n\r\n" } else { "" }).unwrap();
        assert_eq!(client.read_response().unwrap().status(), 200, "{chunked}");
    }
    let framings: Vec<_> = upstream
        .requests()
        .iter()
        .map(|seen| seen.framing)
        .collect();
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
    let all_open = Barrier::new(STREAMS);
    let (upstream, proxy) = serve(move |request| {
        let pieces = pieces(std::str::from_utf8(request.read_body()?).unwrap());
        request.start_events()?;
        request.chunk(&pieces[0])?;
        // No stream goes on before every stream has begun.
        all_open.wait();
        let mut rest = pieces[1..].iter();
        rest.try_for_each(|piece| request.chunk(piece))?;
        request.chunk("")
    });
    let request = |number| format!("request {number}");
    let mut clients: Vec<_> = (0..STREAMS).map(|_| proxy.client()).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.send_post("", request(number)).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let response = client.read_response().unwrap();
        assert_eq!(response.status(), 200);
        let whole = pieces(&request(number)).concat();
        assert!(response.body == whole.as_bytes(), "{number} is not whole");
    }
    assert_eq!(upstream.connections(), STREAMS);
}

const LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n";
const PART: &str = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nonly";
const CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
const CHUNK: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nonly\r\n9\r\nonly";

/// What an upstream has sent when it stalls, and what the client does until then.
const STALLS: [(&str, &str); 10] = [
    ("waits", ""),
    ("waits", "HTTP/1.1 2"),
    ("waits", "HTTP/1.1 200 OK\r\nContent-"),
    ("waits", "HTTP/1.1 100 Continue\r\n\r\n"),
    ("has the head", LENGTH),
    ("reads", PART),
    ("reads", CHUNK),
    ("reads a flood", CHUNKS),
    ("sends a body", ""),
    ("sends chunks", ""),
];

#[test]
fn a_client_that_leaves_ends_the_upstream_request_at_once() {
    let (tell, told) = channel();
    let (go_on, held) = channel();
    let (_upstream, mut proxy) = serve(move |request| {
        let Ok(number) = request.header("x-stall").parse::<usize>() else {
            return ok(request);
        };
        if number == STALLS.len() {
            request.read_body()?;
            request.start_events()?;
            request.chunk("data: 1\n\n")?;
            held.recv()?;
            request.chunk("data: 2\n\n")?;
            return request.chunk("");
        }
        let (client, answer) = STALLS[number];
        let left = if client.starts_with("sends") {
            request.read_part()?;
            tell.send("stalls").unwrap();
            request.read_body().is_err()
        } else {
            request.read_body()?;
            request.send(answer)?;
            tell.send("stalls").unwrap();
            let event = "x".repeat(10_000);
            while client == "reads a flood" && request.chunk(&event).is_ok() {}
            client == "reads a flood" || request.wait_until_closed().is_ok()
        };
        let how = if left { "left" } else { "not left" };
        tell.send(how).unwrap();
        Err(io::ErrorKind::ConnectionAborted.into())
    });
    let mut stays = proxy.client();
    let header = format!("X-Stall: {}\r\n", STALLS.len());
    stays.send_post(&header, "{}").unwrap();
    for how in ["closes", "resets"] {
        let mut clients = Vec::new();
        for (number, (does, _)) in STALLS.into_iter().enumerate() {
            let mut client = proxy.client();
            let header = format!("X-Stall: {number}\r\n");
            let length = client.post_head(&format!("{header}Content-Length: 1000\r\n"));
            let chunks = client.post_head(&format!("{header}Transfer-Encoding: chunked\r\n"));
            match does {
                "sends a body" => client.send(length + "part").unwrap(),
                "sends chunks" => client.send(chunks + "4\r\npart\r\n").unwrap(),
                _ => client.send_post(&header, "{}").unwrap(),
            }
            assert_eq!(told.recv().unwrap(), "stalls", "{number}");
            if does.starts_with("reads") || does.starts_with("has") {
                client.read_head().unwrap();
            }
            if does.starts_with("reads") {
                client.read_part().unwrap();
            }
            clients.push(client);
        }
        assert_eq!(
            proxy.post_default().status(),
            200,
            "while all of them stall"
        );
        for (number, client) in clients.into_iter().enumerate() {
            match how {
                "closes" => drop(client),
                _ => client.reset(),
            }
            let left = told.recv_timeout(PROMPT).unwrap();
            assert_eq!(left, "left", "{number}: a client that {how}");
            // Of a body that breaks off it can't be told who broke it.
            let end = match STALLS[number].0.starts_with("sends") {
                true => "error=\"the request body is truncated",
                false => "error=\"client left\"",
            };
            proxy.wait_for_line(|line| line.contains(end));
            assert_eq!(proxy.post_default().status(), 200, "after {number}");
        }
    }
    // One that stayed all the while has its stream to the end.
    go_on.send(()).unwrap();
    assert_eq!(
        stays.read_response().unwrap().body,
        b"data: 1\n\ndata: 2\n\n"
    );
}
