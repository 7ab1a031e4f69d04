//! Headers, framing, bodies and statuses are forwarded without change in both directions, except for hop-by-hop fields.

mod support;

use std::sync::OnceLock;
use support::*;

/// Forwards a request with these header lines and these bytes after its head. Returns what the upstream received, and
/// its header fields except `Authorization` and `Host`, which are checked here.
fn forward(headers: &str, rest: &str) -> (String, RecordedRequest) {
    let (upstream, proxy) = serve(ok);
    let mut client = proxy.client();
    client.send(client.post_head(headers) + rest).unwrap();
    assert_eq!(client.read_response().unwrap().status(), 200, "{headers}");
    let recorded = upstream.single_request();
    let key = format!("authorization: Bearer {KEY}");
    let host = format!("host: localhost:{}", upstream.port);
    let mut lines = recorded.head.sorted();
    assert!(recorded.complete && lines.contains(&key) && lines.contains(&host));
    lines.retain(|line| *line != key && *line != host);
    assert_eq!(recorded.head.start, "POST /v1/responses HTTP/1.1");
    (lines.join("\n"), recorded)
}

#[test]
fn request_headers_are_forwarded_without_hop_by_hop_fields() {
    let end_to_end = (
        "User-Agent: codex/1.0\r\nAccept: text/event-stream\r\nAccept-Encoding: gzip, br\r\n\
         Content-Type: application/json\r\nCookie: a=b\r\nX-Repeated: 1\r\nX-Between: 2\r\nX-Repeated: 3\r\n\
         x-repeated: 1\r\nX-Empty:\r\nX-Blanks: \t a  b \t\r\nX-Latin: caf\u{e9}\r\nX-List: a, b,,c\r\n\
         OpenAI-Organization: org\r\nForwarded: for=mine\r\nX-Forwarded-For: mine\r\nVia: 1.1 mine\r\n\
         Date: Tue, 15 Nov 1994 08:12:31 GMT\r\nIdempotency-Key: k\r\nX_Under_Score: u\r\nProxy-Status: fine\r\n",
        // The é is encoded as UTF-8, in two bytes.
        "accept: text/event-stream\naccept-encoding: gzip, br\ncontent-length: 2\n\
         content-type: application/json\ncookie: a=b\ndate: Tue, 15 Nov 1994 08:12:31 GMT\nforwarded: for=mine\n\
         idempotency-key: k\nopenai-organization: org\nproxy-status: fine\nuser-agent: codex/1.0\nvia: 1.1 mine\n\
         x-between: 2\nx-blanks: a  b\nx-empty: \nx-forwarded-for: mine\nx-latin: caf\u{c3}\u{a9}\n\
         x-list: a, b,,c\nx-repeated: 1\nx-repeated: 3\nx-repeated: 1\nx_under_score: u",
    );
    let hop_by_hop = (
        "Connection: keep-alive, X-Named ,x-also\r\nConnection: X-Second-Line\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic x\r\nProxy-Authenticate: Basic\r\n\
         TE: trailers\r\nTrailer: X-Trailer\r\nX-Named: 1\r\nX-Named: 2\r\nX-Also: 1\r\nX-Second-Line: 1\r\n\
         X-Kept: 1\r\n",
        "content-length: 2\nx-kept: 1",
    );
    // Neither `Connection` nor the client's `Authorization` can remove the key.
    let names = "Connection: authorization, host, content-length, close\r\n";
    let own = "Authorization: Bearer theirs\r\nauthorization: Basic too\r\n";
    let nothing = "content-length: 2";
    for (headers, expected) in [
        ("", nothing),
        end_to_end,
        hop_by_hop,
        (names, nothing),
        (own, nothing),
    ] {
        let headers = format!("{headers}Content-Length: 2\r\n");
        let (lines, recorded) = forward(&headers, "{}");
        assert_eq!(lines, expected, "{headers}");
        assert_eq!(recorded.body, b"{}", "{headers}");
    }
}

#[test]
fn request_framing_is_preserved() {
    let chunks = "2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n";
    let unusual_chunks = "005;a=b\r\nhello\r\n000\r\nX-Trailer: t\r\n\r\n";
    use Framing::{Chunked, Length};
    for (header, rest, framing, body) in [
        ("Content-Length: 5\r\n", "hello", Length(5), "hello"),
        ("Content-Length: 0\r\n", "", Length(0), ""),
        ("Transfer-Encoding: chunked\r\n", chunks, Chunked, "hello"),
        (
            "transfer-encoding: CHUNKED\r\n",
            unusual_chunks,
            Chunked,
            "hello",
        ),
        ("", "", Length(0), ""),
    ] {
        let (lines, recorded) = forward(header, rest);
        assert!(lines.lines().count() <= 1, "{header:?}: {lines}");
        assert_eq!(recorded.framing, framing, "{header:?}");
        assert_eq!(recorded.body, body.as_bytes(), "{header:?}");
    }
}

#[test]
fn client_gets_100_continue_before_it_sends_its_body() {
    let (upstream, proxy) = serve(ok);
    let mut client = proxy.client();
    let headers = "Expect: 100-continue\r\nContent-Length: 5\r\n";
    client.send_head(headers).unwrap();
    assert_eq!(client.read_head().unwrap().status(), 100);
    client.send("hello").unwrap();
    assert_eq!(client.read_response().unwrap().status(), 200);
    let recorded = upstream.single_request();
    assert_eq!(recorded.head.get("expect"), None);
    assert_eq!(recorded.body, b"hello");
}

// The worked example in CONTRIBUTING.md.
#[test]
fn rate_limit_response_is_returned_with_its_headers() {
    let (upstream, mut proxy) = serve(|request| {
        request.read_body()?;
        request.respond("429 Too Many Requests", "Retry-After: 7\r\n", b"slow down")
    });
    let response = proxy.client().post("X-Custom: 1\r\n", "{}").unwrap();
    assert_eq!(response.status(), 429);
    assert_eq!(response.head.get("retry-after"), Some("7"));
    assert_eq!(upstream.single_request().head.get("x-custom"), Some("1"));
    proxy.wait_for_request("request ", &[" status=429 "]);
}

/// Responses of an upstream: status, a header field in lower case, body.
const RESPONSES: &str = "200 OK|x-request-id: r|{}
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

fn columns(row: &str) -> [&str; 3] {
    row.split('|').collect::<Vec<_>>().try_into().unwrap()
}

#[test]
fn statuses_headers_and_bodies_are_returned_unchanged() {
    let (upstream, proxy) = serve(|request| {
        let row = String::from_utf8(request.read_body()?.to_vec()).unwrap();
        let [status, header, body] = columns(&row);
        let header = format!("{header}\r\n");
        request.respond(status, header.trim_start(), body.as_bytes())
    });
    let mut client = proxy.client();
    for row in RESPONSES.lines() {
        let response = client.post("", row).unwrap();
        let [status, header, body] = columns(row);
        assert_eq!(response.status().to_string(), status[..3]);
        assert_eq!(response.body, body.as_bytes(), "{row}");
        let mut expected = vec![format!("content-length: {}", body.len()), header.to_owned()];
        expected.retain(|line| !line.is_empty());
        let why = "no header field is added or lost";
        assert_eq!(response.head.sorted(), expected, "{why}: {row}");
    }
    let why = "no redirect is followed, and no request is sent twice";
    assert_eq!(
        upstream.requests().len(),
        RESPONSES.lines().count(),
        "{why}"
    );
    assert_eq!(upstream.connections(), 1, "the connection is reused");
}

/// The writes of a response, by its status. Each is sent for a request with the status as its body.
#[rustfmt::skip]
const FRAMINGS: &[(&str, &[&str])] = &[
    ("204", &["HTTP/1.1 204 No Content\r\nX-Mine: 1\r\n\r\n"]),
    ("304", &["HTTP/1.1 304 Not Modified\r\nETag: e\r\n\r\n"]),
    // Chunks override the length, and trailer fields are dropped.
    ("202", &[
        "HTTP/1.1 202 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n\
         2\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n",
    ]),
    ("203", &["HTTP/1.1 203 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n{}"]),
    ("206", &["HTTP/1.0 206 OK\r\nContent-Length: 2\r\n\r\n{}"]),
    ("207", &["HTTP/1.1 207 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n", "{}"]),
    ("201", &["HTTP/1.1 201 OK\r\n\r\nno length, ", "but an end"]),
    ("200", &[
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        "final",
    ]),
];

#[test]
fn responses_of_every_framing_keep_the_client_connection() {
    let (upstream, proxy) = serve(|request| {
        let status = String::from_utf8(request.read_body()?.to_vec()).unwrap();
        let mut writes = find_case(FRAMINGS, &status).iter();
        writes.try_for_each(|bytes| request.send(bytes))?;
        if status == "201" {
            return request.close();
        }
        Ok(())
    });
    let mut client = proxy.client();
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
    // Not reused: connections after HTTP/1.0, `Connection: close`, and a body that ends with the connection.
    assert_eq!(upstream.connections(), 4);
}

#[test]
fn response_headers_are_returned_without_hop_by_hop_fields() {
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
fn client_connection_stays_open_unless_close_or_http_1_0() {
    let (upstream, proxy) = serve(|request| {
        request.read_body()?;
        request.respond_with_events(&["data: 1\n\n", "data: 2\n\n"])
    });
    let in_a_list = "Connection: x\r\nConnection: y, CLOSE ,z\r\n";
    for (version, header, persists) in [
        ("1.1", "", true),
        ("1.1", "Connection: keep-alive\r\n", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", in_a_list, false),
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
        assert!(
            version == "1.1" || !chunked,
            "{name}: HTTP/1.0 has no chunks"
        );
        let connection = response.head.get("connection");
        assert_eq!(connection, (!persists).then_some("close"), "{name}");
        if persists {
            assert_eq!(client.post_default().unwrap().status(), 200, "{name}");
        } else {
            assert_eq!(client.read_until_closed().unwrap(), b"", "{name}");
        }
    }
    let is_of_1_1 =
        |recorded: &RecordedRequest| recorded.head.start == "POST /v1/responses HTTP/1.1";
    assert!(upstream.requests().iter().all(is_of_1_1));
    let connections = upstream.connections();
    assert_eq!(connections, 1, "the upstream connection is always reused");
}

#[test]
fn pipelined_requests_get_responses_in_order() {
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
fn upstream_url_is_used_exactly_as_given() {
    let azure = "/openai/v1/responses?api-version=preview";
    let unusual = "/a%2Fb/%c3%A9/?b=%2F&c&d=?/";
    let (tls, plain) = (Upstream::start(ok), Upstream::start_plain(ok));
    for (upstream, host, path, target) in [
        (&tls, "localhost", azure, azure),
        (&tls, "localhost", unusual, unusual),
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

/// Bytes in which no two pages are equal.
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

fn mebibytes() -> impl Iterator<Item = &'static [u8]> {
    large().chunks(1 << 20)
}

#[test]
fn large_bodies_are_forwarded_complete_both_ways() {
    let (upstream, proxy) = serve(|request| {
        request.read_body()?;
        match request.recorded.framing {
            Framing::Chunked => request.respond_with_events(&mebibytes().collect::<Vec<_>>()),
            _ => request.respond("200 OK", "", large()),
        }
    });
    let mut client = proxy.client();
    let response = client.post("", large()).unwrap();
    assert!(response.head.get("content-length").is_some());
    assert!(response.body == large(), "{} bytes", response.body.len());
    client.send_head("Transfer-Encoding: chunked\r\n").unwrap();
    mebibytes().for_each(|part| client.chunk(part).unwrap());
    client.chunk("").unwrap();
    let response = client.read_response().unwrap();
    assert!(response.head.get("transfer-encoding").is_some());
    assert!(response.body == large(), "{} bytes", response.body.len());
    let recorded = upstream.requests();
    assert_eq!(recorded[0].framing, Framing::Length(LARGE as u64));
    assert_eq!(recorded[1].framing, Framing::Chunked);
    assert!(recorded.iter().all(|s| s.complete && s.body == large()));
}
