//! Requests and responses are streamed without buffering, many at once, and a client disconnect cancels the upstream
//! request.

mod support;

use std::{io, sync::Barrier};
use support::*;

const EVENTS: usize = 50;

fn event(number: usize) -> String {
    format!("event: response.output_text.delta\ndata: {{\"delta\":\"{number}\"}}\n\n")
}

#[test]
fn each_event_arrives_before_the_next_is_sent() {
    let (notify, received) = channel();
    let upstream = Upstream::start(move |request| {
        request.read_body()?;
        request.start_events()?;
        for number in 0..EVENTS {
            // If the proxy buffered the head or the last event, both ends would wait until the timeout.
            received.recv()?;
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
            notify.send(()).unwrap();
            let expected = event(number).into_bytes();
            let mut received = Vec::new();
            while received.len() < expected.len() {
                received.extend(client.read_part().unwrap().expect("an event"));
            }
            assert_eq!(received, expected, "event {number}");
        }
        assert_eq!(
            client.read_part().unwrap(),
            None,
            "the response ends properly"
        );
    }
}

#[test]
fn each_byte_of_an_upload_arrives_before_the_next_is_sent() {
    let (forward, arrived) = channel();
    let (upstream, proxy) = serve(move |request| {
        while let Some(part) = request.read_part()? {
            forward.send(part).unwrap();
        }
        ok(request)
    });
    for header in ["Content-Length: 3\r\n", "Transfer-Encoding: chunked\r\n"] {
        let chunked = header.contains("chunked");
        let mut client = proxy.client();
        client.send_head(header).unwrap();
        for byte in ["a", "b", "c"] {
            match chunked {
                true => client.chunk(byte).unwrap(),
                false => client.send(byte).unwrap(),
            }
            assert_eq!(arrived.recv().unwrap(), byte.as_bytes(), "{header}");
        }
        client.send(if chunked { "0\r\n\r\n" } else { "" }).unwrap();
        assert_eq!(client.read_response().unwrap().status(), 200, "{header}");
    }
    let framings: Vec<_> = upstream
        .requests()
        .iter()
        .map(|recorded| recorded.framing)
        .collect();
    assert_eq!(framings, [Framing::Length(3), Framing::Chunked]);
}

#[test]
fn five_hundred_concurrent_streams_arrive_complete() {
    const STREAMS: usize = 500;
    raise_descriptor_limit(3000);

    // Each request gets a different response.
    let parts = |request: &str| -> Vec<String> {
        let part = |n: usize| format!("data: {request} {n} {}\n\n", "x".repeat(100 * n));
        (1..=16).map(part).collect()
    };
    let all_open = Barrier::new(STREAMS);
    let (upstream, proxy) = serve(move |request| {
        let parts = parts(std::str::from_utf8(request.read_body()?).unwrap());
        request.start_events()?;
        request.chunk(&parts[0])?;
        // No stream continues before all have started.
        all_open.wait();
        let mut rest = parts[1..].iter();
        rest.try_for_each(|part| request.chunk(part))?;
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
        let expected = parts(&request(number)).concat();
        assert!(response.body == expected.as_bytes(), "stream {number}");
    }
    assert_eq!(upstream.connections(), STREAMS);
}

const LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n";
const PARTIAL_BODY: &str = "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nonly";
const CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
const PARTIAL_CHUNK: &str =
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nonly\r\n9\r\nonly";

/// How far a client has come when it disconnects.
#[derive(Clone, Copy, PartialEq)]
enum Progress {
    /// It has sent a part of its body.
    SentPart,
    /// It waits for the head of the response.
    SentAll,
    ReadHead,
    ReadPart,
}
use Progress::{ReadHead, ReadPart, SentAll, SentPart};

/// The client's progress, and the bytes that the upstream sends before it stalls.
const STALLS: &[(&str, (Progress, &str))] = &[
    ("no response", (SentAll, "")),
    ("partial status line", (SentAll, "HTTP/1.1 2")),
    ("partial head", (SentAll, "HTTP/1.1 200 OK\r\nContent-")),
    (
        "interim response",
        (SentAll, "HTTP/1.1 100 Continue\r\n\r\n"),
    ),
    ("head", (ReadHead, LENGTH)),
    ("partial body", (ReadPart, PARTIAL_BODY)),
    ("partial chunk", (ReadPart, PARTIAL_CHUNK)),
    (FLOOD, (ReadPart, CHUNKS)),
    ("upload with a length", (SentPart, "")),
    (CHUNKED_UPLOAD, (SentPart, "")),
];
/// The upstream does not stall but sends events as fast as it can.
const FLOOD: &str = "flood of events";
const CHUNKED_UPLOAD: &str = "upload in chunks";

/// Sends a request with this case, and reads as much of the response as the case says.
fn stall(proxy: &Proxy, case: &str, stalled: &SharedReceiver<&str>) -> Client {
    let (progress, _) = find_case(STALLS, case);
    let mut client = proxy.client();
    let header = format!("X-Case: {case}\r\n");
    if case == CHUNKED_UPLOAD {
        let head = client.post_head(&format!("{header}Transfer-Encoding: chunked\r\n"));
        client.send(head + "4\r\npart\r\n").unwrap();
    } else if progress == SentPart {
        let head = client.post_head(&format!("{header}Content-Length: 1000\r\n"));
        client.send(head + "part").unwrap();
    } else {
        client.send_post(&header, "{}").unwrap();
    }
    assert_eq!(stalled.recv().unwrap(), "stalled", "{case}");
    if [ReadHead, ReadPart].contains(&progress) {
        client.read_head().unwrap();
    }
    if progress == ReadPart {
        client.read_part().unwrap();
    }
    client
}

#[test]
fn client_disconnect_cancels_the_upstream_request() {
    let (notify, notified) = channel();
    let (release, released) = channel();
    let (_upstream, mut proxy) = serve(move |request| {
        let case = request.header("x-case");
        if case.is_empty() {
            return ok(request);
        }
        if case == "stays" {
            request.read_body()?;
            request.start_events()?;
            request.chunk("data: 1\n\n")?;
            released.recv()?;
            request.chunk("data: 2\n\n")?;
            return request.chunk("");
        }
        let (progress, response) = find_case(STALLS, &case);
        let is_closed = if progress == SentPart {
            request.read_part()?;
            notify.send("stalled").unwrap();
            request.read_body().is_err()
        } else {
            request.read_body()?;
            request.send(response)?;
            notify.send("stalled").unwrap();
            let event = "x".repeat(10_000);
            while case == FLOOD && request.chunk(&event).is_ok() {}
            case == FLOOD || request.wait_until_closed().is_ok()
        };
        let outcome = if is_closed { "closed" } else { "open" };
        notify.send(outcome).unwrap();
        Err(io::ErrorKind::ConnectionAborted.into())
    });
    let mut staying = proxy.client();
    staying.send_post("X-Case: stays\r\n", "{}").unwrap();
    for disconnect in ["close", "reset"] {
        let clients = STALLS
            .iter()
            .map(|(case, _)| stall(&proxy, case, &notified));
        let clients: Vec<_> = clients.collect();
        let status = proxy.post_default().status();
        assert_eq!(status, 200, "while all of them stall");
        for ((case, (progress, _)), client) in STALLS.iter().zip(clients) {
            let name = format!("{case}, {disconnect}");
            match disconnect {
                "close" => drop(client),
                _ => client.reset(),
            }
            let outcome = notified.recv_timeout(PROMPT).unwrap();
            assert_eq!(outcome, "closed", "{name}");
            // For an upload, the cause is not known.
            let error = match progress {
                SentPart => "error=\"the request body is truncated",
                _ => "error=\"client left\"",
            };
            proxy.wait_for_line(|line| line.contains(error));
            assert_eq!(proxy.post_default().status(), 200, "{name}: the next");
        }
    }
    release.send(()).unwrap();
    let body = staying.read_response().unwrap().body;
    assert_eq!(body, b"data: 1\n\ndata: 2\n\n", "a client that stays");
}
