//! What is forwarded is forwarded faithfully: headers, lengths, bodies and statuses, both ways, and nothing is added.

mod support;

use std::sync::OnceLock;
use support::{
    client::Client,
    http::{Framing, Head},
    proxy::{KEY, Launch},
    upstream::{Seen, Upstream, ok},
};

/// The headers of a request beside those that every proxied one has of its own.
fn end_to_end(head: &Head) -> Vec<(String, String)> {
    let mut fields = head.sorted();
    fields.retain(|(name, _)| !["authorization", "host"].contains(&name.as_str()));
    fields
}

fn pairs(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    let own = |(name, value): &(&str, &str)| (name.to_string(), value.to_string());
    fields.iter().map(own).collect()
}

/// What reaches the upstream of a request with these header lines and the body `{}`.
fn seen_of(headers: &str) -> Seen {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client.post(headers, b"{}").unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    upstream.only()
}

#[test]
fn a_request_gets_the_key_and_the_upstreams_host_and_nothing_else() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    Client::connect(proxy.port).ask().unwrap();
    let seen = upstream.only();
    assert_eq!(seen.head.start, "POST /v1/responses HTTP/1.1");
    let host = format!("localhost:{}", upstream.port);
    let authorization = format!("Bearer {KEY}");
    let expected = pairs(&[
        ("authorization", &authorization),
        ("content-length", "2"),
        ("host", &host),
    ]);
    assert_eq!(seen.head.sorted(), expected);
    assert_eq!(seen.body, b"{}");
}

#[test]
fn end_to_end_headers_go_up_as_they_came() {
    let seen = seen_of(
        "User-Agent: codex/1.0\r\nAccept: text/event-stream\r\nAccept-Encoding: gzip, br\r\n\
         Content-Type: application/json\r\nCookie: a=b\r\nX-Repeated: 1\r\nX-Between: 2\r\nX-Repeated: 3\r\n\
         x-repeated: 1\r\nX-Empty:\r\nX-Blanks: \t a  b \t\r\nX-Latin: caf\u{e9}\r\nX-List: a, b,,c\r\n\
         OpenAI-Organization: org\r\nForwarded: for=mine\r\nX-Forwarded-For: mine\r\nVia: 1.1 mine\r\n\
         Date: Tue, 15 Nov 1994 08:12:31 GMT\r\nIdempotency-Key: k\r\nX_Under_Score: u\r\nProxy-Status: fine\r\n",
    );
    // Written as UTF-8, so two bytes.
    let latin = "caf\u{c3}\u{a9}";
    let expected = [
        ("accept", "text/event-stream"),
        ("accept-encoding", "gzip, br"),
        ("content-length", "2"),
        ("content-type", "application/json"),
        ("cookie", "a=b"),
        ("date", "Tue, 15 Nov 1994 08:12:31 GMT"),
        ("forwarded", "for=mine"),
        ("idempotency-key", "k"),
        ("openai-organization", "org"),
        ("proxy-status", "fine"),
        ("user-agent", "codex/1.0"),
        ("via", "1.1 mine"),
        ("x-between", "2"),
        ("x-blanks", "a  b"),
        ("x-empty", ""),
        ("x-forwarded-for", "mine"),
        ("x-latin", latin),
        ("x-list", "a, b,,c"),
        ("x-repeated", "1"),
        ("x-repeated", "3"),
        ("x-repeated", "1"),
        ("x_under_score", "u"),
    ];
    assert_eq!(end_to_end(&seen.head), pairs(&expected));
}

#[test]
fn headers_about_one_connection_do_not_go_up() {
    let seen = seen_of(
        "Connection: keep-alive, X-Named ,x-also\r\nConnection: X-Second-Line\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\nProxy-Authenticate: Basic\r\n\
         TE: trailers\r\nTrailer: X-Trailer\r\nX-Named: 1\r\nX-Named: 2\r\nX-Also: 1\r\nX-Second-Line: 1\r\n\
         X-Kept: 1\r\n",
    );
    assert_eq!(
        end_to_end(&seen.head),
        pairs(&[("content-length", "2"), ("x-kept", "1")])
    );
}

#[test]
fn connection_can_name_neither_the_key_nor_the_length_away() {
    let seen = seen_of("Connection: authorization, host, content-length, close\r\n");
    assert_eq!(
        seen.head.get("authorization"),
        Some(format!("Bearer {KEY}").as_str())
    );
    assert!(seen.head.get("host").is_some());
    assert_eq!(
        (seen.framing, seen.body),
        (Framing::Length(2), b"{}".into())
    );
}

#[test]
fn a_known_length_stays_one_and_chunks_stay_chunks() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let cases = [
        (
            "a length",
            "Content-Length: 5\r\n",
            "hello",
            Framing::Length(5),
            "hello",
        ),
        (
            "length 0",
            "Content-Length: 0\r\n",
            "",
            Framing::Length(0),
            "",
        ),
        (
            "chunks",
            "Transfer-Encoding: chunked\r\n",
            "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
            Framing::Chunked,
            "hello",
        ),
        (
            "chunks in other words",
            "transfer-encoding: CHUNKED\r\n",
            "005;a=b\r\nhello\r\n000\r\nX-Trailer: t\r\n\r\n",
            Framing::Chunked,
            "hello",
        ),
        ("neither", "", "", Framing::Length(0), ""),
    ];
    for (name, headers, sent, framing, body) in cases {
        let mut client = Client::connect(proxy.port);
        let head = client.post_head(headers);
        client.send(head + sent).unwrap();
        assert_eq!(client.response().unwrap().status(), 200, "{name}");
        let seen = upstream.seen().pop().unwrap();
        assert_eq!(
            (seen.framing, seen.complete),
            (framing, true),
            "{name}: {:?}",
            seen.head
        );
        assert_eq!(seen.body, body.as_bytes(), "{name}");
        assert_eq!(seen.head.get("trailer"), None, "{name}");
    }
}

#[test]
fn a_client_that_expects_100_continue_gets_it_before_its_body() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    let head = client.post_head("Expect: 100-continue\r\nContent-Length: 5\r\n");
    client.send(head).unwrap();
    assert_eq!(client.head().unwrap().status(), 100);
    client.send("hello").unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    let seen = upstream.only();
    assert_eq!(end_to_end(&seen.head), pairs(&[("content-length", "5")]));
    assert_eq!(seen.body, b"hello");
}

#[test]
fn interim_answers_of_the_upstream_do_not_end_the_exchange() {
    let upstream = Upstream::start(|exchange| {
        exchange.body()?;
        exchange.send("HTTP/1.1 100 Continue\r\n\r\n")?;
        exchange.send("HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n")?;
        exchange.answer("200 OK", "", b"final")
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    for _ in 0..2 {
        let response = client.ask().unwrap();
        assert_eq!((response.status(), response.body), (200, b"final".into()));
    }
}

#[test]
fn statuses_come_back_with_their_headers_and_bodies() {
    let cases = [
        ("200 OK", "X-Request-Id: r\r\n", "{}"),
        ("201 Created", "", "{}"),
        ("202 Accepted", "", ""),
        (
            "307 Temporary Redirect",
            "Location: https://elsewhere.example/v1/responses\r\n",
            "moved",
        ),
        ("308 Permanent Redirect", "Location: /v1/other\r\n", ""),
        ("400 Bad Request", "", "{\"error\":{\"message\":\"bad\"}}"),
        (
            "401 Unauthorized",
            "WWW-Authenticate: Bearer\r\n",
            "{\"error\":{\"message\":\"who\"}}",
        ),
        ("403 Forbidden", "", "theirs, not ours"),
        ("404 Not Found", "", ""),
        ("413 Content Too Large", "", "large"),
        (
            "429 Too Many Requests",
            "Retry-After: 20\r\nX-RateLimit-Reset-Requests: 1s\r\n",
            "slower",
        ),
        ("500 Internal Server Error", "", "oops"),
        ("502 Bad Gateway", "", "theirs, not ours"),
        ("503 Service Unavailable", "Retry-After: 5\r\n", "later"),
        ("529 Site Is Overloaded", "", "x"),
    ];
    let upstream = Upstream::start(move |exchange| {
        let case: usize = std::str::from_utf8(exchange.body()?)
            .unwrap()
            .parse()
            .unwrap();
        let (status, headers, body) = cases[case];
        exchange.answer(status, headers, body.as_bytes())
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    for (number, (status, headers, body)) in cases.into_iter().enumerate() {
        client.post("", number.to_string().as_bytes()).unwrap();
        let response = client
            .response()
            .unwrap_or_else(|error| panic!("{status}: {error}"));
        assert_eq!(response.status().to_string(), status[..3]);
        assert_eq!(response.body, body.as_bytes(), "{status}");
        let mut expected: Vec<_> = headers
            .lines()
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        expected.push(("content-length".to_owned(), body.len().to_string()));
        expected.sort();
        assert_eq!(
            response.head.sorted(),
            expected,
            "{status}: nothing is added, nothing is lost"
        );
    }
    assert_eq!(
        upstream.seen().len(),
        cases.len(),
        "no redirect is followed, nothing is sent twice"
    );
    assert_eq!(upstream.connections(), 1, "one connection does for all");
}

#[test]
fn answers_without_a_body_come_back_without_one() {
    let upstream = Upstream::start(|exchange| match exchange.body()? {
        b"204" => exchange.send("HTTP/1.1 204 No Content\r\nX-Mine: 1\r\n\r\n"),
        _ => exchange.send("HTTP/1.1 304 Not Modified\r\nETag: \"e\"\r\n\r\n"),
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    for (status, header) in [(204, "x-mine"), (304, "etag")] {
        client.post("", status.to_string().as_bytes()).unwrap();
        let response = client.response().unwrap();
        assert_eq!(response.status(), status);
        assert!(response.head.get(header).is_some());
    }
}

#[test]
fn headers_of_an_answer_come_back_in_order_but_for_those_about_one_connection() {
    let upstream = Upstream::start(|exchange| {
        exchange.body()?;
        exchange.answer(
            "200 OK",
            "Set-Cookie: a=1\r\nX-Between: 1\r\nSet-Cookie: b=2\r\nset-cookie: a=1\r\nServer: theirs\r\n\
             Date: Tue, 15 Nov 1994 08:12:31 GMT\r\nContent-Type: text/plain; charset=utf-8\r\nX-Empty:\r\n\
             Connection: keep-alive, X-Named\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\n\
             Proxy-Connection: close\r\nUpgrade: h2c\r\nTrailer: X-Trailer\r\nX-Named: 1\r\nX-Latin: caf\u{e9}\r\n\
             Alt-Svc: h3=\":443\"\r\nCF-Ray: 1\r\n",
            b"body",
        )
    });
    let proxy = Launch::to(&upstream).start();
    let response = Client::connect(proxy.port).ask().unwrap();
    let expected = [
        ("alt-svc", "h3=\":443\""),
        ("cf-ray", "1"),
        ("content-length", "4"),
        ("content-type", "text/plain; charset=utf-8"),
        ("date", "Tue, 15 Nov 1994 08:12:31 GMT"),
        ("server", "theirs"),
        ("set-cookie", "a=1"),
        ("set-cookie", "b=2"),
        ("set-cookie", "a=1"),
        ("x-between", "1"),
        ("x-empty", ""),
        ("x-latin", "caf\u{c3}\u{a9}"),
    ];
    assert_eq!(response.head.sorted(), pairs(&expected));
    assert_eq!(response.body, b"body");
}

#[test]
fn an_answer_that_ends_with_its_connection_comes_back_whole() {
    let upstream = Upstream::start(|exchange| {
        exchange.body()?;
        exchange.send("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nno length, ")?;
        exchange.send("but an end")?;
        exchange.close_after();
        Ok(())
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    let response = client.ask().unwrap();
    assert_eq!(response.body, b"no length, but an end");
    assert_eq!(
        response.head.get("transfer-encoding"),
        Some("chunked"),
        "its end can be told"
    );
    assert_eq!(
        client.ask().unwrap().status(),
        200,
        "the client's connection stays"
    );
}

#[test]
fn a_client_of_http_1_0_is_served() {
    let upstream = Upstream::start(|exchange| {
        exchange.body()?;
        exchange.begin_events()?;
        exchange.chunk("data: 1\n\n")?;
        exchange.chunk("data: 2\n\n")?;
        exchange.chunk("")
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client
        .send("POST /v1/responses HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}")
        .unwrap();
    let response = client.response().unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(
        response.head.get("transfer-encoding"),
        None,
        "it knows no chunks"
    );
    assert_eq!(response.body, b"data: 1\n\ndata: 2\n\n");
    assert_eq!(upstream.only().head.start, "POST /v1/responses HTTP/1.1");
}

#[test]
fn a_connection_stays_unless_the_client_wants_it_closed() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let cases = [
        ("nothing", "1.1", "", true),
        ("to keep it", "1.1", "Connection: keep-alive\r\n", true),
        ("to close it", "1.1", "Connection: close\r\n", false),
        (
            "to close it, among others",
            "1.1",
            "Connection: x\r\nConnection: y, CLOSE ,z\r\n",
            false,
        ),
        ("HTTP/1.0", "1.0", "", false),
        (
            "HTTP/1.0, to keep it",
            "1.0",
            "Connection: keep-alive\r\n",
            false,
        ),
    ];
    for (name, version, header, stays) in cases {
        let mut client = Client::connect(proxy.port);
        let host = format!("Host: localhost:{}\r\n", proxy.port);
        let head =
            format!("POST /v1/responses HTTP/{version}\r\n{host}{header}Content-Length: 2\r\n\r\n");
        client.send(head + "{}").unwrap();
        let response = client.response().unwrap();
        assert_eq!(response.status(), 200, "{name}");
        if version == "1.1" {
            let said = response.head.get("connection");
            assert_eq!(said, (!stays).then_some("close"), "{name}");
        }
        if stays {
            assert_eq!(client.ask().unwrap().status(), 200, "{name}");
        } else {
            assert_eq!(client.until_closed().unwrap(), b"", "{name}");
        }
    }
}

#[test]
fn requests_sent_before_the_answer_to_the_last_are_answered_in_order() {
    let upstream = Upstream::start(|exchange| {
        let body = exchange.body()?.to_vec();
        exchange.answer("200 OK", "", &body)
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    let requests: String = (0..20)
        .map(|number| {
            client.post_head(&format!("Content-Length: {}\r\n", number)) + &"x".repeat(number)
        })
        .collect();
    client.send(requests).unwrap();
    for number in 0..20 {
        assert_eq!(client.response().unwrap().body.len(), number);
    }
}

#[test]
fn the_upstream_urls_path_and_query_are_kept_to_the_letter() {
    let upstream = Upstream::start(ok);
    let origin = upstream.url().replace("/v1/responses", "");
    let cases = [
        (
            "a query, as on Azure",
            "/openai/v1/responses?api-version=preview",
            "/openai/v1/responses?api-version=preview",
        ),
        ("an odd query", "/a?b=%2F&c&d=?/", "/a?b=%2F&c&d=?/"),
        ("an encoded path", "/a%2Fb/%c3%A9", "/a%2Fb/%c3%A9"),
        ("a trailing slash", "/v1/responses/", "/v1/responses/"),
        ("no path", "", "/"),
        ("a query and no path", "?a=b", "/?a=b"),
    ];
    for (name, path, target) in cases {
        let launch = Launch::new()
            .arg("--upstream-ca")
            .arg(upstream.authority().unwrap());
        let proxy = launch
            .args(["--upstream-url", &format!("{origin}{path}")])
            .start();
        Client::connect(proxy.port)
            .ask()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let seen = upstream.seen().pop().unwrap();
        assert_eq!(seen.head.start, format!("POST {target} HTTP/1.1"), "{name}");
        assert_eq!(
            seen.head.get("host"),
            Some(&*format!("localhost:{}", upstream.port)),
            "{name}"
        );
    }
}

#[test]
fn an_upstream_by_address_and_one_without_tls_on_loopback_are_served() {
    let tls = Upstream::start(ok);
    let plain = Upstream::plain(ok);
    let by_address = tls.url().replace("localhost", "127.0.0.1");
    let authority = tls.authority().unwrap();
    let launch = Launch::new()
        .args(["--upstream-url", &by_address])
        .arg("--upstream-ca")
        .arg(authority);
    for (name, launch) in [("by address", launch), ("without TLS", Launch::to(&plain))] {
        let proxy = launch.start();
        assert_eq!(
            Client::connect(proxy.port).ask().unwrap().status(),
            200,
            "{name}"
        );
    }
    assert_eq!(
        tls.only().head.get("host"),
        Some(&*format!("127.0.0.1:{}", tls.port))
    );
    assert_eq!(
        plain.only().head.get("authorization"),
        Some(&*format!("Bearer {KEY}"))
    );
}

#[test]
fn connections_to_the_upstream_are_used_again() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    for _ in 0..10 {
        // A new client each time.
        assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    }
    assert_eq!(upstream.connections(), 1);
}

const LARGE: usize = 64 << 20;

/// Bytes of which no page is like another.
fn large() -> &'static [u8] {
    static LARGE_BODY: OnceLock<Vec<u8>> = OnceLock::new();
    LARGE_BODY.get_or_init(|| {
        let mut bytes = vec![b'.'; LARGE];
        for (number, page) in bytes.chunks_exact_mut(4096).enumerate() {
            page[..8].copy_from_slice(&number.to_be_bytes());
        }
        bytes
    })
}

#[test]
fn large_bodies_go_up_whole() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let body = large();
    let mut client = Client::connect(proxy.port);
    client.post("", body).unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    let head = client.post_head("Transfer-Encoding: chunked\r\n");
    client.send(head).unwrap();
    for chunk in body.chunks(1 << 20) {
        client.send(format!("{:x}\r\n", chunk.len())).unwrap();
        client.send(chunk).unwrap();
        client.send("\r\n").unwrap();
    }
    client.send("0\r\n\r\n").unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    let seen = upstream.seen();
    assert_eq!(seen[0].framing, Framing::Length(LARGE as u64));
    assert_eq!(seen[1].framing, Framing::Chunked);
    assert!(seen.iter().all(|seen| seen.complete && seen.body == body));
}

#[test]
fn large_answers_come_back_whole() {
    let upstream = Upstream::start(|exchange| match exchange.body()? {
        b"length" => exchange.answer("200 OK", "", large()),
        _ => {
            exchange.begin_events()?;
            for chunk in large().chunks(1 << 20) {
                exchange.send(format!("{:x}\r\n", chunk.len()))?;
                exchange.send(chunk)?;
                exchange.send("\r\n")?;
            }
            exchange.chunk("")
        }
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    for (body, framing) in [
        ("length", "content-length"),
        ("chunks", "transfer-encoding"),
    ] {
        client.post("", body.as_bytes()).unwrap();
        let response = client.response().unwrap();
        assert!(response.head.get(framing).is_some(), "{body}");
        assert!(
            response.body == large(),
            "{body}: {} bytes",
            response.body.len()
        );
    }
}

#[test]
fn every_request_is_one_line_in_the_log_that_shows_nothing_of_it() {
    let upstream = Upstream::start(|exchange| {
        exchange.body()?;
        exchange.answer("429 Too Many Requests", "X-Secret: hunter2\r\n", b"hunter2")
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client
        .post(
            "X-Secret: hunter2\r\nUser-Agent: hunter2\r\n",
            b"hunter2 and more",
        )
        .unwrap();
    assert_eq!(client.response().unwrap().status(), 429);
    drop(client);
    let log = proxy.stop().stderr;
    let requests: Vec<_> = log
        .iter()
        .filter(|line| line.starts_with("request "))
        .collect();
    let [line] = requests.as_slice() else {
        panic!("{log:#?}");
    };
    let words: Vec<_> = line.split(' ').collect();
    for word in ["status=429", "in=16", "out=7"] {
        assert!(words.contains(&word), "{word} is not in {line}");
    }
    assert!(words.iter().any(|word| word.starts_with("ms=")), "{line}");
    let log = log.join("\n");
    assert!(!log.contains("hunter2") && !log.contains(KEY), "{log}");
}
