//! What is forwarded is forwarded faithfully: headers, lengths, bodies and statuses, both ways, and nothing is added.

mod support;

use std::sync::OnceLock;
use support::*;

/// What reaches the upstream of a request with these header lines, and this behind them: its headers, but for those
/// that every proxied one has of its own, and its body.
fn forward(headers: &str, rest: &str) -> (String, RecordedRequest) {
    let (upstream, proxy) = serve(ok);
    let mut client = proxy.client();
    client.send(client.post_head(headers) + rest).unwrap();
    assert_eq!(client.read_response().unwrap().status(), 200, "{headers}");
    let seen = upstream.single_request();
    let key = format!("authorization: Bearer {KEY}");
    let host = format!("host: localhost:{}", upstream.port);
    let mut lines = seen.head.sorted();
    assert!(seen.complete && lines.contains(&key) && lines.contains(&host));
    lines.retain(|line| *line != key && *line != host);
    assert_eq!(seen.head.start, "POST /v1/responses HTTP/1.1");
    (lines.join("\n"), seen)
}

#[test]
fn end_to_end_headers_go_up_as_they_came_and_no_others() {
    let as_they_came = (
        "User-Agent: codex/1.0\r\nAccept: text/event-stream\r\nAccept-Encoding: gzip, br\r\n\
         Content-Type: application/json\r\nCookie: a=b\r\nX-Repeated: 1\r\nX-Between: 2\r\nX-Repeated: 3\r\n\
         x-repeated: 1\r\nX-Empty:\r\nX-Blanks: \t a  b \t\r\nX-Latin: caf\u{e9}\r\nX-List: a, b,,c\r\n\
         OpenAI-Organization: org\r\nForwarded: for=mine\r\nX-Forwarded-For: mine\r\nVia: 1.1 mine\r\n\
         Date: Tue, 15 Nov 1994 08:12:31 GMT\r\nIdempotency-Key: k\r\nX_Under_Score: u\r\nProxy-Status: fine\r\n",
        // The é is written as UTF-8, so two bytes.
        "accept: text/event-stream\naccept-encoding: gzip, br\ncontent-length: 2\n\
         content-type: application/json\ncookie: a=b\ndate: Tue, 15 Nov 1994 08:12:31 GMT\nforwarded: for=mine\n\
         idempotency-key: k\nopenai-organization: org\nproxy-status: fine\nuser-agent: codex/1.0\nvia: 1.1 mine\n\
         x-between: 2\nx-blanks: a  b\nx-empty: \nx-forwarded-for: mine\nx-latin: caf\u{c3}\u{a9}\n\
         x-list: a, b,,c\nx-repeated: 1\nx-repeated: 3\nx-repeated: 1\nx_under_score: u",
    );
    let of_one_connection = (
        "Connection: keep-alive, X-Named ,x-also\r\nConnection: X-Second-Line\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\nProxy-Authenticate: Basic\r\n\
         TE: trailers\r\nTrailer: X-Trailer\r\nX-Named: 1\r\nX-Named: 2\r\nX-Also: 1\r\nX-Second-Line: 1\r\n\
         X-Kept: 1\r\n",
        "content-length: 2\nx-kept: 1",
    );
    // Neither `Connection` nor the client's own take the place of the key.
    let names = "Connection: authorization, host, content-length, close\r\n";
    let own = "Authorization: Bearer theirs\r\nauthorization: Basic too\r\n";
    let nothing = "content-length: 2";
    for (headers, expected) in [
        ("", nothing),
        as_they_came,
        of_one_connection,
        (names, nothing),
        (own, nothing),
    ] {
        let headers = format!("{headers}Content-Length: 2\r\n");
        let (lines, seen) = forward(&headers, "{}");
        assert_eq!(lines, expected, "{headers}");
        assert_eq!(seen.body, b"{}", "{headers}");
    }
}

#[test]
fn a_known_length_stays_one_and_chunks_stay_chunks() {
    let chunks = "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n";
    let others = "005;a=b\r\nhello\r\n000\r\nX-Trailer: t\r\n\r\n";
    use Framing::{Chunked, Length};
    for (header, rest, framing, body) in [
        ("Content-Length: 5\r\n", "hello", Length(5), "hello"),
        ("Content-Length: 0\r\n", "", Length(0), ""),
        ("Transfer-Encoding: chunked\r\n", chunks, Chunked, "hello"),
        ("transfer-encoding: CHUNKED\r\n", others, Chunked, "hello"),
        ("", "", Length(0), ""),
    ] {
        let (lines, seen) = forward(header, rest);
        assert!(lines.lines().count() <= 1, "{header:?}: {lines}");
        assert_eq!(seen.framing, framing, "{header:?}");
        assert_eq!(seen.body, body.as_bytes(), "{header:?}");
    }
}

#[test]
fn a_client_that_expects_100_continue_gets_it_before_its_body() {
    let (upstream, proxy) = serve(ok);
    let mut client = proxy.client();
    let headers = "Expect: 100-continue\r\nContent-Length: 5\r\n";
    client.send_head(headers).unwrap();
    assert_eq!(client.read_head().unwrap().status(), 100);
    client.send("hello").unwrap();
    assert_eq!(client.read_response().unwrap().status(), 200);
    let seen = upstream.single_request();
    assert_eq!(seen.head.get("expect"), None);
    assert_eq!(seen.body, b"hello");
}

/// Answers of an upstream: status, a header in lower case, body.
const ANSWERS: &str = "200 OK|x-request-id: r|{}
202 Accepted||
307 Temporary Redirect|location: https://elsewhere.example/v1/responses|moved
308 Permanent Redirect|location: /v1/other|
400 Bad Request||{\"error\":{\"message\":\"bad\"}}
401 Unauthorized|www-authenticate: Bearer|{}
403 Forbidden||theirs, not ours
404 Not Found||
413 Content Too Large||large
429 Too Many Requests|retry-after: 20|slower
500 Internal Server Error||oops
502 Bad Gateway||theirs, not ours
503 Service Unavailable|x-ratelimit-reset-requests: 1s|later
529 Site Is Overloaded||x";

fn parts(answer: &str) -> [&str; 3] {
    answer.split('|').collect::<Vec<_>>().try_into().unwrap()
}

#[test]
fn statuses_come_back_with_their_headers_and_bodies() {
    let (upstream, proxy) = serve(|request| {
        let answer = String::from_utf8(request.read_body()?.to_vec()).unwrap();
        let [status, header, body] = parts(&answer);
        request.respond(
            status,
            format!("{header}\r\n").trim_start(),
            body.as_bytes(),
        )
    });
    let mut client = proxy.client();
    for answer in ANSWERS.lines() {
        let response = client.post("", answer).unwrap();
        let [status, header, body] = parts(answer);
        assert_eq!(response.status().to_string(), status[..3]);
        assert_eq!(response.body, body.as_bytes(), "{answer}");
        let mut expected = vec![format!("content-length: {}", body.len()), header.to_owned()];
        expected.retain(|line| !line.is_empty());
        let why = "nothing is added, nothing is lost";
        assert_eq!(response.head.sorted(), expected, "{why}: {answer}");
    }
    let why = "no redirect is followed, nothing is sent twice";
    assert_eq!(upstream.requests().len(), ANSWERS.lines().count(), "{why}");
    assert_eq!(upstream.connections(), 1, "one connection does for all");
}

#[test]
fn an_answer_without_a_body_or_a_length_or_after_others_comes_back_as_it_is() {
    let interim = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
    let (upstream, proxy) = serve(move |request| {
        match request.read_body()? {
        b"204" => request.send("HTTP/1.1 204 No Content\r\nX-Mine: 1\r\n\r\n"),
        b"304" => request.send("HTTP/1.1 304 Not Modified\r\nETag: e\r\n\r\n"),
        // A length beside chunks is none, and trailer fields are left out.
        b"202" => request.send(
            "HTTP/1.1 202 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n",
        ),
        b"203" => request.send("HTTP/1.1 203 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
        b"206" => request.send("HTTP/1.0 206 OK\r\nContent-Length: 2\r\n\r\n{}"),
        b"207" => request.respond("207 OK", "Connection: close\r\n", b"{}"),
        b"200" => {
            request.send(interim)?;
            request.respond("200 OK", "", b"final")
        }
        _ => {
            request.send("HTTP/1.1 201 OK\r\n\r\nno length, ")?;
            request.send("but an end")?;
            request.close()
        }
    }
    });
    let mut client = proxy.client();
    // The client's connection stays in any case.
    for (status, line, body) in [
        ("204", "x-mine: 1", ""),
        ("200", "content-length: 5", "final"),
        ("304", "etag: e", ""),
        ("202", "transfer-encoding: chunked", "{}"),
        ("203", "content-length: 2", "{}"),
        ("206", "content-length: 2", "{}"),
        ("207", "content-length: 2", "{}"),
        ("201", "transfer-encoding: chunked", "no length, but an end"),
        ("200", "content-length: 5", "final"),
    ] {
        let response = client.post("", status).unwrap();
        assert_eq!(response.status().to_string(), status);
        assert_eq!(response.head.sorted(), [line], "{status}");
        assert_eq!(response.body, body.as_bytes(), "{status}");
    }
    // Not kept are the connections of HTTP/1.0, of one that says so, and of one that ended.
    assert_eq!(upstream.connections(), 4);
}

#[test]
fn headers_of_an_answer_come_back_in_order_but_for_those_about_one_connection() {
    let (_upstream, proxy) = serve(|request| {
        request.read_body()?;
        request.respond(
            "200 OK",
            "Set-Cookie: a=1\r\nX-Between: 1\r\nSet-Cookie: b=2\r\nset-cookie: a=1\r\nServer: theirs\r\n\
             Date: Tue, 15 Nov 1994 08:12:31 GMT\r\nContent-Type: text/plain; charset=utf-8\r\nX-Empty:\r\n\
             Connection: keep-alive, X-Named\r\nKeep-Alive: timeout=5\r\nProxy-Authenticate: Basic\r\n\
             Proxy-Connection: close\r\nUpgrade: h2c\r\nTrailer: X-Trailer\r\nX-Named: 1\r\nX-Latin: caf\u{e9}\r\n\
             Alt-Svc: h3=\":443\"\r\nCF-Ray: 1\r\n",
            b"body",
        )
    });
    let response = proxy.post_default();
    let expected = "alt-svc: h3=\":443\"\ncf-ray: 1\ncontent-length: 4\ncontent-type: text/plain; charset=utf-8\n\
        date: Tue, 15 Nov 1994 08:12:31 GMT\nserver: theirs\nset-cookie: a=1\nset-cookie: b=2\nset-cookie: a=1\n\
        x-between: 1\nx-empty: \nx-latin: caf\u{c3}\u{a9}";
    assert_eq!(response.head.sorted().join("\n"), expected);
    assert_eq!(response.body, b"body");
}

#[test]
fn repairable_response_headers_are_repaired() {
    let (_upstream, proxy) = serve(|request| {
        request.read_body()?;
        request.send(
            "HTTP/1.1 200 OK\r\nX-Blank : 1\r\nX-Tab\t: 2\r\nX-Folded: a\r\n  b\r\n\tc\r\n\
             Transfer-Encoding : chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        )
    });
    let mut client = proxy.client();
    for _ in 0..2 {
        let response = client.post_default().unwrap();
        assert_eq!(response.status(), 200);
        let expected = "transfer-encoding: chunked\nx-blank: 1\nx-folded: a b c\nx-tab: 2";
        let lines = response.head.sorted().join("\n");
        assert_eq!(lines.replace("  ", " "), expected);
        assert_eq!(response.body, b"{}");
    }
}

#[test]
fn a_connection_stays_unless_the_client_wants_it_closed_or_is_of_http_1_0() {
    let (upstream, proxy) = serve(|request| {
        request.read_body()?;
        request.respond_with_events(&["data: 1\n\n", "data: 2\n\n"])
    });
    let among_others = "Connection: x\r\nConnection: y, CLOSE ,z\r\n";
    for (version, header, stays) in [
        ("1.1", "", true),
        ("1.1", "Connection: keep-alive\r\n", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", among_others, false),
        ("1.0", "", false),
        ("1.0", "Connection: keep-alive\r\n", false),
    ] {
        let name = format!("{version} {header:?}");
        let mut client = proxy.client();
        let head = client.post_head(&format!("{header}Content-Length: 2\r\n"));
        let head = head.replace("1.1\r", &format!("{version}\r"));
        client.send(head + "{}").unwrap();
        let response = client.read_response().unwrap();
        assert_eq!(response.status(), 200, "{name}");
        assert_eq!(response.body, b"data: 1\n\ndata: 2\n\n", "{name}");
        let chunked = response.head.get("transfer-encoding").is_some();
        assert!(version == "1.1" || !chunked, "{name}: it knows no chunks");
        let said = response.head.get("connection");
        assert_eq!(said, (!stays).then_some("close"), "{name}");
        if stays {
            assert_eq!(client.post_default().unwrap().status(), 200, "{name}");
        } else {
            assert_eq!(client.read_until_closed().unwrap(), b"", "{name}");
        }
    }
    let is_of_1_1 = |seen: &RecordedRequest| seen.head.start == "POST /v1/responses HTTP/1.1";
    assert!(upstream.requests().iter().all(is_of_1_1));
    let connections = upstream.connections();
    assert_eq!(connections, 1, "to the upstream, it stays in any case");
}

#[test]
fn requests_sent_before_the_answer_to_the_last_are_answered_in_order() {
    let (_upstream, proxy) = serve(echo);
    let mut client = proxy.client();
    let request = |n: usize| client.post_head(&format!("Content-Length: {n}\r\n")) + &"x".repeat(n);
    let requests: String = (0..20).map(request).collect();
    client.send(requests).unwrap();
    for number in 0..20 {
        assert_eq!(client.read_response().unwrap().body.len(), number);
    }
}

#[test]
fn the_upstream_urls_address_path_and_query_are_kept_to_the_letter() {
    let azure = "/openai/v1/responses?api-version=preview";
    let odd = "/a%2Fb/%c3%A9/?b=%2F&c&d=?/";
    let (tls, plain) = (Upstream::start(ok), Upstream::start_plain(ok));
    for (upstream, host, path, target) in [
        (&tls, "localhost", azure, azure),
        (&tls, "localhost", odd, odd),
        (&tls, "localhost", "", "/"),
        (&tls, "localhost", "?a=b", "/?a=b"),
        (&tls, "127.0.0.1", "/", "/"),
        (&plain, "localhost", "/", "/"),
    ] {
        let url = upstream.url().replace("/v1/responses", path);
        let url = url.replace("localhost", host);
        let command = ProxyCommand::new().trust(upstream).url(&url);
        assert_eq!(command.start().post_default().status(), 200, "{url}");
        let head = upstream.requests().pop().unwrap().head;
        assert_eq!(head.start, format!("POST {target} HTTP/1.1"));
        let host = format!("{host}:{}", upstream.port);
        assert_eq!(head.get("host"), Some(host.as_str()), "{url}");
        assert_eq!(head.all("authorization"), [format!("Bearer {KEY}")]);
    }
}

const LARGE: usize = 32 << 20;

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

fn pieces() -> impl Iterator<Item = &'static [u8]> {
    large().chunks(1 << 20)
}

#[test]
fn large_bodies_and_answers_pass_whole() {
    let (upstream, proxy) = serve(|request| {
        request.read_body()?;
        match request.recorded.framing {
            Framing::Chunked => request.respond_with_events(&pieces().collect::<Vec<_>>()),
            _ => request.respond("200 OK", "", large()),
        }
    });
    let mut client = proxy.client();
    let answer = client.post("", large()).unwrap();
    assert!(answer.head.get("content-length").is_some());
    assert!(answer.body == large(), "{} bytes", answer.body.len());
    client.send_head("Transfer-Encoding: chunked\r\n").unwrap();
    pieces().for_each(|piece| client.chunk(piece).unwrap());
    client.chunk("").unwrap();
    let answer = client.read_response().unwrap();
    assert!(answer.head.get("transfer-encoding").is_some());
    assert!(answer.body == large(), "{} bytes", answer.body.len());
    let seen = upstream.requests();
    assert_eq!(seen[0].framing, Framing::Length(LARGE as u64));
    assert_eq!(seen[1].framing, Framing::Chunked);
    assert!(seen.iter().all(|s| s.complete && s.body == large()));
}

#[test]
fn every_request_is_one_line_in_the_log_that_shows_nothing_of_it() {
    let (_upstream, mut proxy) = serve(|request| {
        request.read_body()?;
        request.respond("429 Too Many Requests", "X-Secret: hunter2\r\n", b"hunter2")
    });
    let mut client = proxy.client();
    let headers = "X-Secret: hunter2\r\nUser-Agent: hunter2\r\n";
    let response = client.post(headers, "hunter2 and more").unwrap();
    assert_eq!(response.status(), 429);
    drop(client);
    let words = [" status=429 ", " in=16 ", " out=7", " ms="];
    proxy.wait_for_request("request ", &words);
    let log = proxy.stop().stderr;
    let requests = log.iter().filter(|line| line.starts_with("request "));
    assert_eq!(requests.count(), 1, "{log:#?}");
    let log = log.join("\n");
    assert!(!log.contains("hunter2") && !log.contains(KEY), "{log}");
}
