//! Malformed requests: each is answered once with an error or not at all, its connection ends, and none of them ever
//! completes a request upstream.

mod support;

use support::{
    client::Client,
    http::find,
    proxy::Launch,
    upstream::{Upstream, ok},
};

/// Sends each on a connection of its own, then ends the proxy and looks at all that the upstream got of them.
fn assert_rejected(cases: Vec<(&str, Vec<u8>)>) {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let mut wrong = Vec::new();
    for (name, bytes) in &cases {
        let mut client = Client::connect(proxy.port);
        // It may be closed while this is still being written.
        let _ = client.send(bytes);
        if let Ok(head) = client.head() {
            if ![400, 403, 413, 414, 431, 501, 505].contains(&head.status()) {
                wrong.push(format!("{name}: {}", head.start));
            }
            client
                .rest()
                .unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        client.finish_sending();
        let more = client
            .until_closed()
            .unwrap_or_else(|error| panic!("{name}: not closed: {error}"));
        if find(&more, b"HTTP/1.").is_some() {
            wrong.push(format!("{name}: a second answer"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // What works shows that the others were not merely lost.
    let mut client = Client::connect(proxy.port);
    client.post("X-Case: well-formed\r\n", b"{}").unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    proxy.stop();
    let complete: Vec<_> = upstream
        .close()
        .into_iter()
        .filter(|seen| seen.complete)
        .collect();
    let [seen] = complete.as_slice() else {
        panic!("these got through: {complete:#?}");
    };
    assert_eq!(seen.head.get("x-case"), Some("well-formed"));
}

/// A request with these headers beside `Host`, and this behind its head.
fn post(headers: &str, rest: &str) -> Vec<u8> {
    format!("POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n{rest}").into_bytes()
}

/// A request with this first line.
fn start(line: &str) -> Vec<u8> {
    format!("{line}\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}").into_bytes()
}

/// What a second request would look like if the first were understood in another way.
const HIDDEN: &str = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";

#[test]
fn requests_whose_length_can_be_read_in_two_ways() {
    let chunked = "0\r\n\r\n";
    let both = format!("{chunked}{HIDDEN}");
    let length = |value: &str| post(&format!("Content-Length: {value}\r\n"), "{}");
    let coding = |value: &str| post(&format!("Transfer-Encoding: {value}\r\n"), &both);
    assert_rejected(vec![
        ("two lengths", post("Content-Length: 2\r\nContent-Length: 3\r\n", "{}")),
        ("two lengths in one line", length("2, 3")),
        ("the same length twice in one line", length("2, 2")),
        ("an empty length", length("")),
        ("a length with a sign", length("+2")),
        ("a negative length", length("-2")),
        ("a length in hexadecimal", length("0x2")),
        ("a length with a fraction", length("2.0")),
        ("a length with a unit", length("2 bytes")),
        ("a length with a blank within", length("2 0")),
        ("a length in quotes", length("\"2\"")),
        ("a length beyond 64 bits", length("18446744073709551618")),
        ("another coding", coding("gzip")),
        ("no coding", coding("")),
        ("identity", coding("identity")),
        ("another coding before chunks", coding("gzip, chunked")),
        ("another coding behind chunks", coding("chunked, gzip")),
        ("chunks of chunks", coding("chunked, chunked")),
        ("chunks twice", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", &both)),
        ("chunks and identity", post("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", &both)),
        ("a coding that ends like chunked", coding("xchunked")),
        ("a coding that begins like chunked", coding("chunkedx")),
        ("chunked in quotes", coding("\"chunked\"")),
        ("chunked with a parameter", coding("chunked;a=b")),
        ("chunked and a comma", coding("chunked,")),
        ("chunked behind a vertical tab", coding("\x0bchunked")),
        ("a blank before the colon", post("Transfer-Encoding : chunked\r\n", &both)),
        ("a blank before the colon of a length", post("Content-Length : 2\r\n", "{}")),
        (
            "chunks in HTTP/1.0",
            format!("POST /v1/responses HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{both}").into(),
        ),
    ]);
}

#[test]
fn a_length_that_is_said_twice_or_beside_chunks_is_read_in_one_way() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let both = format!("0\r\n\r\n{HIDDEN}");
    let twice = "Content-Length: 2\r\nContent-Length: 2\r\n";
    let mut client = Client::connect(proxy.port);
    client.send(post(twice, "{}")).unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    assert_eq!(
        client.ask().unwrap().status(),
        200,
        "the next is in its place"
    );
    for headers in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: x\r\n",
    ] {
        // What is behind the last chunk is another request, or the rest of this one: nobody reads it.
        let mut client = Client::connect(proxy.port);
        client.send(post(headers, &both)).unwrap();
        let response = client.response().unwrap();
        assert_eq!(response.status(), 200, "{headers}");
        assert_eq!(response.head.get("connection"), Some("close"), "{headers}");
        client.finish_sending();
        assert_eq!(
            client.until_closed().unwrap(),
            b"",
            "{headers}: only one answer"
        );
    }
    proxy.stop();
    let seen = upstream.close();
    let lengths: Vec<_> = seen
        .iter()
        .map(|seen| seen.head.get("content-length"))
        .collect();
    assert_eq!(lengths, [Some("2"), Some("2"), None, None, None]);
    assert!(seen.iter().skip(2).all(|seen| seen.body.is_empty()));
}

#[test]
fn bodies_in_bad_chunks() {
    let cases = [
        ("no size", "\r\n{}\r\n0\r\n\r\n"),
        ("no number", "x\r\n{}\r\n0\r\n\r\n"),
        ("a sign", "+2\r\n{}\r\n0\r\n\r\n"),
        ("a negative size", "-2\r\n{}\r\n0\r\n\r\n"),
        ("a prefix", "0x2\r\n{}\r\n0\r\n\r\n"),
        ("a blank before", " 2\r\n{}\r\n0\r\n\r\n"),
        ("a fraction", "2.0\r\n{}\r\n0\r\n\r\n"),
        ("beyond 64 bits", "10000000000000002\r\n{}\r\n0\r\n\r\n"),
        ("all the bits", "ffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
        ("longer than it says", "2\r\n{}}\r\n0\r\n\r\n"),
        ("shorter than it says", "3\r\n{}\r\n0\r\n\r\n"),
        ("no line break behind", "2\r\n{}0\r\n\r\n"),
        ("only a CR behind the size", "2\r{}\r\n0\r\n\r\n"),
        ("a CR in an extension", "2;a=\rb\r\n{}\r\n0\r\n\r\n"),
        ("a NUL in the size", "2\0\r\n{}\r\n0\r\n\r\n"),
        ("a bad one behind a good one", "2\r\n{}\r\nx\r\n\r\n"),
        ("no last one", "2\r\n{}\r\n"),
        ("half of one", "5\r\n{}"),
        ("no end behind the last one", "2\r\n{}\r\n0\r\n"),
    ];
    let request = |chunks: &str| post("Transfer-Encoding: chunked\r\n", chunks);
    let mut cases: Vec<_> = cases
        .iter()
        .map(|&(name, chunks)| (name, request(chunks)))
        .collect();
    let extension = format!("2;{}\r\n{{}}\r\n0\r\n\r\n", "x".repeat(100_000));
    cases.push(("an endless extension", request(&extension)));
    let trailer = format!(
        "2\r\n{{}}\r\n0\r\nX-Trailer: {}\r\n\r\n",
        "x".repeat(100_000)
    );
    cases.push(("an endless trailer", request(&trailer)));
    assert_unfinished(cases);
}

/// As [`assert_rejected`], for bodies that break after a good head: their clients send no more, as if they waited.
fn assert_unfinished(cases: Vec<(&str, Vec<u8>)>) {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    for (name, bytes) in &cases {
        let mut client = Client::connect(proxy.port);
        let _ = client.send(bytes);
        client.finish_sending();
        let all = client
            .until_closed()
            .unwrap_or_else(|error| panic!("{name}: not closed: {error}"));
        let answers: Vec<_> = all
            .windows(9)
            .filter(|window| window.starts_with(b"HTTP/1.1 "))
            .collect();
        assert!(answers.len() <= 1, "{name}: {}", all.escape_ascii());
        assert!(
            !all.starts_with(b"HTTP/1.1 2"),
            "{name}: {}",
            all.escape_ascii()
        );
    }
    proxy.stop();
    let complete: Vec<_> = upstream
        .close()
        .into_iter()
        .filter(|seen| seen.complete)
        .collect();
    assert!(complete.is_empty(), "these got through: {complete:#?}");
}

#[test]
fn heads_that_are_no_http() {
    let header = |line: &str| post(&format!("{line}\r\nContent-Length: 2\r\n"), "{}");
    assert_rejected(vec![
        (
            "no HTTP at all",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".into(),
        ),
        (
            "HTTP/2",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".into(),
        ),
        (
            "HTTP/2 in the first line",
            start("POST /v1/responses HTTP/2.0"),
        ),
        ("HTTP/1.2", start("POST /v1/responses HTTP/1.2")),
        ("HTTP/0.9", b"POST /v1/responses\r\n\r\n".into()),
        (
            "a version in lower case",
            start("POST /v1/responses http/1.1"),
        ),
        (
            "a version with a blank",
            start("POST /v1/responses HTTP/ 1.1"),
        ),
        (
            "two blanks before the target",
            start("POST  /v1/responses HTTP/1.1"),
        ),
        (
            "two blanks behind the target",
            start("POST /v1/responses  HTTP/1.1"),
        ),
        (
            "a blank in the target",
            start("POST /v1/responses /v1/responses HTTP/1.1"),
        ),
        ("a tab for a blank", start("POST\t/v1/responses\tHTTP/1.1")),
        (
            "a blank before the method",
            start(" POST /v1/responses HTTP/1.1"),
        ),
        ("no target", start("POST  HTTP/1.1")),
        (
            "a target without a slash",
            start("POST v1/responses HTTP/1.1"),
        ),
        (
            "a target with a NUL",
            start("POST /v1/responses\0 HTTP/1.1"),
        ),
        ("a target with a CR", start("POST /v1/responses\r HTTP/1.1")),
        (
            "a method with a NUL",
            start("POST\0 /v1/responses HTTP/1.1"),
        ),
        ("a NUL in a value", header("X-Header: a\0b")),
        ("a NUL in a name", header("X-He\0ader: a")),
        ("a CR in a value", header("X-Header: a\rb")),
        (
            "a CR and a header in a value",
            header("X-Header: a\rContent-Length: 0"),
        ),
        ("a CR before a name", header("\rX-Header: a")),
        ("a control character in a value", header("X-Header: a\x01b")),
        ("a DEL in a value", header("X-Header: a\x7fb")),
        ("a value on two lines", header("X-Header: a\r\n b")),
        (
            "a value on two lines with a tab",
            header("X-Header: a\r\n\tb"),
        ),
        (
            "a first header that begins with a blank",
            b"POST /v1/responses HTTP/1.1\r\n Host: localhost\r\n\r\n".into(),
        ),
        ("a header without a colon", header("X-Header")),
        ("a header without a name", header(": a")),
        ("a blank in a name", header("X Header: a")),
        ("a name that is not ASCII", header("X-Héader: a")),
        ("a name in parentheses", header("(X-Header): a")),
        (
            "no Host",
            b"POST /v1/responses HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}".into(),
        ),
        (
            "an empty Host",
            b"POST /v1/responses HTTP/1.1\r\nHost: \r\nContent-Length: 2\r\n\r\n{}".into(),
        ),
        ("two Hosts", header("Host: localhost")),
        ("two Hosts that differ", header("Host: evil.example")),
    ]);
}

#[test]
fn heads_that_are_too_large() {
    let kib = |count: usize| "x".repeat(count * 1024);
    let headers = |count: usize| {
        (0..count)
            .map(|number| format!("X-{number}: 1\r\n"))
            .collect::<String>()
    };
    assert_rejected(vec![
        (
            "one large header",
            post(
                &format!("X-Header: {}\r\nContent-Length: 2\r\n", kib(65)),
                "{}",
            ),
        ),
        (
            "one huge header",
            post(
                &format!("X-Header: {}\r\nContent-Length: 2\r\n", kib(2000)),
                "{}",
            ),
        ),
        (
            "headers that are large together",
            post(
                &(0..33)
                    .map(|n| format!("X-{n}: {}\r\n", kib(2)))
                    .collect::<String>(),
                "",
            ),
        ),
        ("a large name", post(&format!("{}: a\r\n", kib(66)), "")),
        (
            "a large target",
            start(&format!("POST /v1/responses?{} HTTP/1.1", kib(66))),
        ),
        (
            "a large method",
            start(&format!("{} /v1/responses HTTP/1.1", kib(66))),
        ),
        ("129 headers", post(&headers(128), "")),
        ("too many headers", post(&headers(1000), "")),
        (
            "a head without an end",
            format!("POST /v1/responses HTTP/1.1\r\n{}", kib(70)).into(),
        ),
    ]);
}

#[test]
fn heads_that_are_just_small_enough_are_served() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let cases = [
        // With `Host` and `Content-Length`.
        (
            "128 headers",
            (0..126)
                .map(|number| format!("X-{number}: 1\r\n"))
                .collect::<String>(),
        ),
        (
            "nearly 64 KiB",
            format!("X-Header: {}\r\n", "x".repeat(64 * 1024 - 200)),
        ),
    ];
    for (name, headers) in cases {
        let mut client = Client::connect(proxy.port);
        client.post(&headers, b"{}").unwrap();
        let response = client
            .response()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(response.status(), 200, "{name}");
    }
}
