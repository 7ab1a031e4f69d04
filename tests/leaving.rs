//! A client that leaves ends the upstream's work at once, whatever both are at, and harms nobody else.

mod support;

use std::io;
use support::*;

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
    let (tell, told) = telling();
    let (go_on, held) = telling();
    let (_upstream, mut proxy) = serve(move |exchange| {
        let Ok(number) = exchange.header("x-stall").parse::<usize>() else {
            return ok(exchange);
        };
        if number == STALLS.len() {
            exchange.body()?;
            exchange.begin_events()?;
            exchange.chunk("data: 1\n\n")?;
            held.wait()?;
            exchange.chunk("data: 2\n\n")?;
            return exchange.chunk("");
        }
        let (client, answer) = STALLS[number];
        let left = if client.starts_with("sends") {
            exchange.piece()?;
            tell.send("stalls").unwrap();
            exchange.body().is_err()
        } else {
            exchange.body()?;
            exchange.send(answer)?;
            tell.send("stalls").unwrap();
            let event = "x".repeat(10_000);
            while client == "reads a flood" && exchange.chunk(&event).is_ok() {}
            client == "reads a flood" || exchange.wait_until_left().is_ok()
        };
        let how = if left { "left" } else { "not left" };
        tell.send(how).unwrap();
        Err(io::ErrorKind::ConnectionAborted.into())
    });
    let mut stays = proxy.client();
    let header = format!("X-Stall: {}\r\n", STALLS.len());
    stays.post(&header, "{}").unwrap();
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
                _ => client.post(&header, "{}").unwrap(),
            }
            assert_eq!(told.wait().unwrap(), "stalls", "{number}");
            if does.starts_with("reads") || does.starts_with("has") {
                client.head().unwrap();
            }
            if does.starts_with("reads") {
                client.piece().unwrap();
            }
            clients.push(client);
        }
        assert_eq!(proxy.ask().status(), 200, "while all of them stall");
        for (number, client) in clients.into_iter().enumerate() {
            match how {
                "closes" => drop(client),
                _ => client.reset(),
            }
            let left = told.within(AT_ONCE).unwrap();
            assert_eq!(left, "left", "{number}: a client that {how}");
            // Of a body that breaks off it can't be told who broke it.
            let end = match STALLS[number].0.starts_with("sends") {
                true => "error=\"the request's body broke off",
                false => "error=\"client left\"",
            };
            proxy.wait_for_line(|line| line.contains(end));
            assert_eq!(proxy.ask().status(), 200, "after {number}");
        }
    }
    // One that stayed all the while has its stream to the end.
    go_on.send(()).unwrap();
    assert_eq!(stays.response().unwrap().body, b"data: 1\n\ndata: 2\n\n");
}
