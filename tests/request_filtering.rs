//! Nothing but a plain `POST /v1/responses` from a local program gets through. Whatever else comes is refused with
//! an error that says so or ends its connection, is answered once, and never completes a request upstream.

mod support;

use Outcome::{Malformed, Refused, Served, Unfinished};
use support::*;

#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    /// 200, and it is one request upstream.
    Served,
    /// 403 with an error that says what is allowed, and a line in the log.
    Refused,
    /// An error or no answer at all, and the end of the connection.
    Malformed,
    /// The same, for a body that breaks after a good head: its client sends no more, as if it waited.
    Unfinished,
}

/// What a malformed request may be answered with.
const ERRORS: [u16; 7] = [400, 403, 413, 414, 431, 501, 505];

/// Sends each on a connection of its own, then ends the proxy and looks at all that the upstream got of them.
fn check(expected: Outcome, requests: impl IntoIterator<Item = impl Into<Vec<u8>>>) {
    check_with(&[], expected, requests);
}

fn check_with<R: Into<Vec<u8>>>(
    args: &[&str],
    expected: Outcome,
    requests: impl IntoIterator<Item = R>,
) {
    let upstream = Upstream::start(ok);
    let mut proxy = ProxyCommand::for_upstream(&upstream).args(args).start();
    let (mut sent, mut served) = (0, 0);
    let mut wrong = Vec::new();
    for request in requests {
        let request = request.into();
        let name = request[..request.len().min(200)].escape_ascii();
        let mut client = proxy.client();
        // It may be closed while this is still being written.
        let _ = client.send(&request);
        if expected == Unfinished {
            client.shutdown_write();
        }
        let response = client.read_response();
        let status = response.as_ref().ok().map(|response| response.status());
        let right = match (expected, status) {
            (Served, _) => status == Some(200),
            (Refused, _) => status == Some(403),
            (_, None) => response.as_ref().is_err_and(is_closed),
            (Malformed, Some(status)) => ERRORS.contains(&status),
            (Unfinished, Some(status)) => status >= 400,
        };
        if !right {
            wrong.push(format!("{name}: {response:?}"));
            continue;
        }
        if expected == Refused {
            let message = response.unwrap().error_message();
            assert!(!message.contains(KEY), "{name}: {message}");
            proxy.wait_for_request("refused ", &[" status=403 ", " reason=\""]);
        }
        client.shutdown_write();
        let more = client.read_until_closed();
        let more = more.unwrap_or_else(|error| panic!("{name}: not closed: {error}"));
        let more = String::from_utf8_lossy(&more);
        assert!(!more.contains("HTTP/1."), "{name}: a second answer: {more}");
        sent += 1;
        served += usize::from(expected == Served);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // What works shows that the others were not merely lost.
    assert_eq!(proxy.post_default().status(), 200);
    let is_outcome = |line: &&String| line.starts_with("request ") || line.starts_with("refused ");
    let log = proxy.stop().stderr;
    let lines = log.iter().filter(is_outcome).count();
    assert_eq!(lines, sent + 1, "one line each: {log:#?}");
    let mut complete = upstream.into_requests();
    complete.retain(|recorded| recorded.complete);
    assert_eq!(complete.len(), served + 1, "got through: {complete:#?}");
}

/// A request for this with a `Host` that is allowed.
fn request(line: &str, headers: &str) -> String {
    format!("{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 2\r\n\r\n{{}}")
}

/// A request with these headers beside `Host`, and this behind its head.
fn post(headers: &str, rest: &str) -> String {
    format!("POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n{rest}")
}

/// A request with this first line.
fn start(line: &str) -> String {
    format!("{line}\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}")
}

/// What a second request would look like if the first were understood in another way.
const HIDDEN: &str = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";

#[test]
fn other_methods_paths_and_spellings_of_the_path_are_refused() {
    let methods = "GET PUT DELETE PATCH OPTIONS TRACE QUERY post Post POSTX BREW";
    let of = |method| request(&format!("{method} /v1/responses"), "");
    check(Refused, methods.split(' ').map(of));
    let lines = ["GET /shutdown", "OPTIONS *"];
    check(Refused, lines.map(|line| request(line, "")));
    let targets = "/ /v1/models /v2/responses /responses /v1/responses/compact /v1/responses/resp_1 /v1/responses/ \
        /v1/responses?stream=true /v1/responses? /v1/responses;a=b /./v1/responses /v1/./responses /v1/responses/. \
        /v1/../v1/responses /v1/responses/x/.. /v1/responses/../models /v1/%2e/responses /v1/response%73 \
        /v1%2fresponses /v1/responses%3Fa=b /v1/responses%00 /v1/responses%20 /v1/responses%0d%0aX-Header:1 \
        /v1/response%2573 /V1/RESPONSES /v1/Responses //v1/responses /v1//responses /v1\\responses /v1/responsesx \
        /v1/response http://localhost/v1/responses https://api.openai.com/v1/responses \
        http://evil.example/v1/responses ftp://localhost/v1/responses /shutdown";
    let of = |target| request(&format!("POST {target}"), "");
    check(Refused, targets.split_whitespace().map(of));
}

#[test]
fn tunnels_are_refused_and_upgrades_ignored() {
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    let unnamed = "Upgrade: anything\r\n";
    check(Refused, [request("GET /v1/responses", websocket)]);
    let of = |headers| request("POST /v1/responses", headers);
    // An offer to upgrade a request that may pass is ignored (RFC 9110, section 7.8).
    check(Served, [websocket, h2c, unnamed].map(of));
    let places = ["api.openai.com:443", "localhost:80", "127.0.0.1:22"];
    let connect = |to| format!("CONNECT {to} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    check(Refused, places.map(connect));
}

#[test]
fn rejects_requests_that_are_almost_websocket_handshakes() {
    let change = |from: &str, to: &str| {
        let changed = handshake("").replace(from, to);
        assert_ne!(changed, handshake(""), "{from}");
        changed
    };
    let targets = "/v1/responses? /v1/responses?model=any /v1/responses/ /v1/responses/ws /v1/models / /v1//responses \
        http://localhost/v1/responses ws://localhost/v1/responses";
    let target = |target| change("/v1/responses", target);
    let methods = "PUT DELETE OPTIONS get";
    let method = |method| change("GET", method);
    // An HTTP/1.0 request can't ask for an upgrade (RFC 9110, section 7.8).
    let versions = ["HTTP/1.0"].map(|version| change("HTTP/1.1", version));
    let upgrades = "Upgrade: h2c|Upgrade: |Upgrade: websocket, h2c|Upgrade: h2c, websocket|Upgrade: websocket/13|\
        Upgrade: websocketx|Upgrade: \"websocket\"|Upgrade: websocket\r\nUpgrade: websocket|\
        Upgrade: h2c\r\nUpgrade: websocket|X-Upgrade: websocket";
    let upgrade = |upgrade| change("Upgrade: websocket", upgrade);
    let connections = "X: 1|Connection: |Connection: keep-alive|Connection: close|Connection: \"upgrade\"|\
        Connection: upgrade-insecure|Connection: keep-alive upgrade";
    let connection = |connection| change("Connection: Upgrade", connection);
    let hosts = FOREIGN.split('|').map(|host| change("localhost", host));
    let with = |header: &str| handshake(&format!("{header}\r\n"));
    let bodies = [
        with("Content-Length: 2") + "{}",
        with("Transfer-Encoding: chunked") + "2\r\n{}\r\n0\r\n\r\n",
    ];
    let all = targets.split_whitespace().map(target);
    let all = all.chain(methods.split(' ').map(method)).chain(versions);
    let all = all.chain(upgrades.split('|').map(upgrade));
    let all = all.chain(connections.split('|').map(connection));
    // A page's script can't leave out Origin: no page opens a WebSocket here.
    let all = all.chain(BROWSERS.split('|').map(with));
    let all = all.chain(hosts).chain(bodies);
    let all: Vec<_> = all.collect();
    // Without the flag, neither they nor a proper handshake are forwarded.
    check(Refused, all.iter().cloned().chain([handshake("")]));
    check_with(&["--websocket"], Refused, all);
    let hosts = ["", "Host: localhost\r\nHost: localhost\r\n"];
    let hosts = hosts.map(|host| change("Host: localhost\r\n", host));
    let others = [
        with("Content-Length: 2\r\nContent-Length: 3") + "{}",
        with("Transfer-Encoding: gzip"),
        change("Upgrade: websocket", "Upgrade : websocket"),
    ];
    let all = hosts.into_iter().chain(others);
    check_with(&["--websocket"], Malformed, all);
}

const BROWSERS: &str = "Origin: https://evil.example|Origin: http://localhost:3000|Origin: null|Origin: |\
    origin: https://evil.example|Sec-Fetch-Site: cross-site|Sec-Fetch-Site: same-origin|Sec-Fetch-Site: none|\
    Connection: origin\r\nOrigin: https://evil.example";

/// Hosts that a name server could have made this machine's, and what else is not this machine. The module that decides
/// has many more.
const FOREIGN: &str =
    "evil.example:80|evil.localhost|127.0.0.1.evil.example|[2001:db8::1]|localhost,evil.example";

#[test]
fn what_comes_from_a_web_page_is_refused() {
    let of = |headers| request("POST /v1/responses", &format!("{headers}\r\n"));
    check(Refused, BROWSERS.split('|').map(of));
    let to = |host| request("POST /v1/responses", "").replace("localhost", host);
    check(Refused, FOREIGN.split('|').map(to));
    check(Served, ["LocalHost", "127.1.2.3", "[::1]:65535"].map(to));
}

#[test]
fn a_web_page_cannot_end_it() {
    let host = "HTTP/1.1\r\nHost: localhost\r\n";
    let shutdown = |line: &str, headers: &str| format!("{line} {host}{headers}\r\n");
    let with = |header: &str| shutdown("GET /shutdown", &format!("{header}\r\n"));
    let lines = "POST /shutdown|GET /shutdown?|GET http://localhost/shutdown|GET /%73hutdown";
    let requests = lines.split('|').map(|line| shutdown(line, ""));
    let requests = requests.chain(BROWSERS.split('|').map(with));
    let to = |host: &str| shutdown("GET /shutdown", "").replace("localhost", host);
    let requests = requests.chain(FOREIGN.split('|').map(to));
    check_with(&["--http-shutdown"], Refused, requests);
}

#[test]
fn a_large_refused_request_ends_its_connection_and_nobody_waits() {
    let (_upstream, proxy) = serve(ok);
    for size in [10_000, 100_000, 1_000_000] {
        for _ in 0..20 {
            let mut client = proxy.client();
            let body = "x".repeat(size);
            let response = client.post("Origin: null\r\n", body).unwrap();
            assert_eq!(response.status(), 403, "{size}");
            if response.head.get("connection") == Some("close") {
                assert_eq!(client.read_until_closed().unwrap(), b"", "{size}");
            } else {
                assert_eq!(
                    client.post_default().unwrap().status(),
                    200,
                    "{size}: the next"
                );
            }
        }
    }
}

#[test]
fn a_refused_request_is_not_asked_for_its_body_and_does_not_harm_the_next() {
    let upstream = Upstream::start(ok);
    let proxy = start_with_websocket(&upstream);
    let expects = "Origin: null\r\nExpect: 100-continue\r\nContent-Length: 5\r\n";
    for (method, headers) in [
        ("POST", expects),
        ("HEAD", "Connection: close\r\n"),
        ("HEAD", HANDSHAKE),
    ] {
        let mut client = proxy.client();
        let head = client.post_head(headers).replace("POST", method);
        client.send(head).unwrap();
        assert_eq!(client.read_head().unwrap().status(), 403, "no 100 before");
        if method != "HEAD" {
            client.read_rest().unwrap();
        }
        if headers != "Connection: close\r\n" {
            client.shutdown_write();
        }
        assert_eq!(client.read_until_closed().unwrap(), b"", "{method}");
    }
    let mut client = proxy.client();
    client.send(request("PUT /v1/responses", "")).unwrap();
    assert_eq!(client.read_response().unwrap().status(), 403);
    assert_eq!(client.post_default().unwrap().status(), 200);
    proxy.stop();
    assert_eq!(upstream.into_requests().len(), 1);
}

#[test]
fn the_body_of_a_refused_request_is_never_taken_for_a_request() {
    let put = |framing: &str, body: &str| post(framing, body).replace("POST", "PUT");
    let chunks = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len());
    let requests = [
        put(&format!("Content-Length: {}\r\n", HIDDEN.len()), HIDDEN),
        put("Transfer-Encoding: chunked\r\n", &chunks),
        put("Content-Length: 100000\r\n", HIDDEN),
    ];
    check(Refused, requests);
}

#[test]
fn requests_whose_length_can_be_read_in_two_ways() {
    let chunks = format!("0\r\n\r\n{HIDDEN}");
    let of = |headers: &str| match headers.to_ascii_lowercase().contains("encoding") {
        true => post(&format!("{headers}\r\n"), &chunks),
        false => post(&format!("{headers}\r\n"), "{}"),
    };
    let lengths = "2, 3|2, 2||+2|-2|0x2|2.0|2 bytes|2 0|\"2\"|18446744073709551618|\
        9223372036854775808|18446744073709551613|18446744073709551615";
    let length = |length| of(&format!("Content-Length: {length}"));
    check(Malformed, lengths.split('|').map(length));
    let codings = "gzip||identity|gzip, chunked|chunked, gzip|chunked, chunked|xchunked|chunkedx|\"chunked\"|\
        chunked;a=b|chunked,|\x0bchunked";
    let coding = |coding| of(&format!("Transfer-Encoding: {coding}"));
    check(Malformed, codings.split('|').map(coding));
    let pad = "x".repeat(9000);
    let far_apart = format!("Transfer-Encoding: chunked\r\nX-Pad: {pad}\r\nContent-Length: 5");
    let both = [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Transfer-Encoding: chunked\r\nContent-Length: x",
        &far_apart,
        "Content-Length: 2\r\nContent-Length: 2",
    ];
    // hyper reads these in one way, and what is behind the chunks is nobody's.
    check(Served, both.map(of));
    let others = [
        "Content-Length: 2\r\nContent-Length: 3",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding : chunked",
        "Content-Length : 2",
    ];
    check(Malformed, others.map(of));
    let in_1_0 = of("Transfer-Encoding: chunked").replace("/1.1\r\nHost", "/1.0\r\nHost");
    check(Malformed, [in_1_0]);
}

#[test]
fn bodies_in_bad_chunks() {
    let sizes = "|x|+2|-2|0x2| 2|2.0|10000000000000002|ffffffffffffffff|3|2;a=\rb|2\0";
    let with_size = |size| format!("{size}\r\n{{}}\r\n0\r\n\r\n");
    let endless = "x".repeat(100_000);
    let chunks = [
        "2\r\n{}}\r\n0\r\n\r\n",
        "2\r\n{}0\r\n\r\n",
        "2\r{}\r\n0\r\n\r\n",
        "2\r\n{}\r\nx\r\n\r\n",
        "2\r\n{}\r\n",
        "5\r\n{}",
        "2\r\n{}\r\n0\r\n",
        &format!("2;{endless}\r\n{{}}\r\n0\r\n\r\n"),
        &format!("2\r\n{{}}\r\n0\r\nX-Trailer: {endless}\r\n\r\n"),
    ];
    let chunks = chunks.map(str::to_owned).into_iter();
    let all = sizes.split('|').map(with_size).chain(chunks);
    let of = |chunks: String| post("Transfer-Encoding: chunked\r\n", &chunks);
    check(Unfinished, all.map(of));
}

#[test]
fn heads_that_are_no_http() {
    let lines = "POST /v1/responses HTTP/2.0|POST /v1/responses HTTP/1.2|POST /v1/responses http/1.1|\
        POST /v1/responses HTTP/ 1.1|POST  /v1/responses HTTP/1.1|POST /v1/responses  HTTP/1.1|\
        POST /v1/responses /v1/responses HTTP/1.1|POST\t/v1/responses\tHTTP/1.1| POST /v1/responses HTTP/1.1|\
        POST  HTTP/1.1|POST v1/responses HTTP/1.1|POST /v1/responses\0 HTTP/1.1|POST /v1/responses\r HTTP/1.1|\
        POST\0 /v1/responses HTTP/1.1";
    check(Malformed, lines.split('|').map(start));
    let fragments = ["#fragment", "#"].map(|end| format!("POST /v1/responses{end} HTTP/1.1"));
    // It goes no further, as in every URL.
    check(Served, fragments.map(|line| start(&line)));
    let headers = "X: a\0b|X\0: a|X: a\rb|X: a\rContent-Length: 0|\rX: a|X: a\x01b|X: a\x7fb|X: a\r\n b|X: a\r\n\tb|\
        X|: a|X Y: a|X-Hé: a|(X): a";
    let of = |header| post(&format!("{header}\r\nContent-Length: 2\r\n"), "{}");
    check(Malformed, headers.split('|').map(of));
    let hosts = "|Host: \r\n|Host: localhost\r\nHost: localhost\r\n|Host: localhost\r\nHost: evil.example\r\n";
    let well_formed = post("Content-Length: 2\r\n", "{}");
    let of = |host| well_formed.replace("Host: localhost\r\n", host);
    check(Malformed, hosts.split('|').map(of));
    let others = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        b"POST /v1/responses\r\n\r\n",
        b"POST /v1/responses HTTP/1.1\r\n Host: localhost\r\n\r\n",
    ];
    check(Malformed, others);
}

#[test]
fn rejection_by_the_http_parser_is_one_log_line_with_reason() {
    let mut proxy = ProxyCommand::new().start();
    let large = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(70_000));
    for (request, status) in [
        ("what is this\r\n\r\n", 400),
        ("GET / HTTP/9.9\r\n\r\n", 400),
        ("\x16\x03\x01\x02\0\x01\0\x01\x7c\x03\x03", 400),
        (&large, 431),
    ] {
        let mut client = proxy.client();
        let _ = client.send(request);
        assert_eq!(client.read_response().unwrap().status(), status);
        let status = format!(" status={status} reason=\"");
        proxy.wait_for_request("refused uid=- ", &[&status]);
    }
    // Clients that leave in the middle of a head or without one are not rejected.
    for request in ["GET / HT", ""] {
        let mut client = proxy.client();
        client.send(request).unwrap();
        client.shutdown_write();
        assert_eq!(client.read_until_closed().unwrap(), b"");
    }
    let log = proxy.stop().stderr;
    let refused = log.iter().filter(|line| line.starts_with("refused "));
    assert_eq!(refused.count(), 4, "{log:#?}");
}

#[test]
fn heads_that_are_too_large_or_just_small_enough() {
    let kib = |count: usize| "x".repeat(count * 1024);
    let headers = |count, value: &str| -> String {
        (0..count).map(|n| format!("X-{n}: {value}\r\n")).collect()
    };
    let of = |headers: String| post(&format!("{headers}Content-Length: 2\r\n"), "{}");
    let too_large = [
        of(headers(1, &kib(65))),
        of(headers(1, &kib(2000))),
        of(headers(33, &kib(2))),
        of(format!("{}: a\r\n", kib(66))),
        start(&format!("POST /v1/responses?{} HTTP/1.1", kib(66))),
        start(&format!("{} /v1/responses HTTP/1.1", kib(66))),
        of(headers(127, "1")),
        of(headers(1000, "1")),
        format!("POST /v1/responses HTTP/1.1\r\n{}", kib(70)),
    ];
    check(Malformed, too_large);
    // 128 headers with `Host` and `Content-Length`, and nearly 64 KiB.
    let most = "x".repeat(64 * 1024 - 200);
    check(Served, [of(headers(126, "1")), of(headers(1, &most))]);
}

/// Shapes that suites for request smuggling have in common, beyond those above: what could be the framing, written
/// so that some readers see it and others don't.
#[test]
fn obscured_framing_is_read_in_one_way_or_rejected() {
    let chunks = "2\r\n{}\r\n0\r\n\r\n";
    let with = |headers: &str, rest: &str| post(&format!("{headers}\r\n"), rest);
    let chunked = [
        "Transfer-Encoding:chunked",
        "Transfer-Encoding:\tchunked\t",
        "Transfer-Encoding: chunKED",
        "X: a\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer_Encoding: gzip",
    ];
    check(Served, chunked.map(|headers| with(headers, chunks)));
    let length = [
        "Content-Length:2",
        "Content-Length:\t2\t",
        "Content-Length: 02",
        "Content_Length: 99\r\nContent-Length: 2",
        "Content-Length: 2\r\nTransfer_Encoding: chunked",
        "Content-Length: 2\r\nX: a, Transfer-Encoding: chunked",
        "Content-Length: 2\r\nConnection: content-length",
    ];
    check(Served, length.map(|headers| with(headers, "{}")));
    let neither = [
        "Transfer-Encoding: \r\n chunked",
        "Transfer-Encoding\t: chunked",
        "\tTransfer-Encoding: chunked",
        "Transfer-Encoding\x00: chunked",
        "Transfer-Encoding\x0b: chunked",
        "Transfer-Encoding: chunked\x0b",
        "Transfer-Encoding: chunked\x00",
        "Transfer-Encoding: \u{a0}chunked",
        "Transfer-Encoding: chunked, ",
        "Transfer-Encoding: , chunked",
        "Transfer-Encoding: 'chunked'",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: ",
        "Transfer-Encoding: identity\r\nContent-Length: 2",
        "Transfer-Encoding",
        "Content-Length:\r\n 2",
        "Content-Length\t: 2",
        "Content-Length: 2\x0b",
        "Content-Length: 2;a=b",
        "Content-Length: 1e1",
        "Content-Length: 0b10",
        "Content-Length: \u{b2}",
        "Content-Length: 2\r\nContent-Length: 02x",
        "Content-Length: 2\r\nContent-Length: ",
        "Content-Length: ,2",
        ": 2",
    ];
    check(Malformed, neither.map(|headers| with(headers, "{}")));
    let lenient = [
        "2 \r\n{}",
        "2;\r\n{}",
        "2;=\r\n{}",
        "0000000000000000000002\r\n{}",
    ];
    let of = |chunk| {
        with(
            "Transfer-Encoding: chunked",
            &format!("{chunk}\r\n0\r\n\r\n"),
        )
    };
    check(Served, lenient.map(of));
    let strict = [
        "2\n{}",
        "\r\n2\r\n{}",
        "02x\r\n{}",
        "2\r\r\n{}",
        "2\r\n{}\n",
        "2_0\r\n{}",
        "\u{b2}\r\n{}",
    ];
    check(Unfinished, strict.map(of));
}
