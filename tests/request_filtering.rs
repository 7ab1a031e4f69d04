//! Only `POST /v1/responses` from a local program is forwarded. Everything else gets one error response or a closed
//! connection, and never completes an upstream request.

mod support;

use Outcome::{Malformed, Rejected, Served, Truncated};
use support::*;

#[derive(Clone, Copy, PartialEq)]
enum Outcome {
    /// 200 and one upstream request.
    Served,
    /// 403 with an error message, and a line in the log.
    Rejected,
    /// An error or no response, and a closed connection.
    Malformed,
    /// The same for an invalid body after a valid head. The client closes its sending half after it.
    Truncated,
}

/// Statuses for a malformed request.
const ERRORS: [u16; 7] = [400, 403, 413, 414, 431, 501, 505];

/// Sends each request on a new connection. Then stops the proxy and checks what the upstream has received.
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
        // The proxy may close the connection during this write.
        let _ = client.send(&request);
        if expected == Truncated {
            client.shutdown_write();
        }
        let response = client.read_response();
        let status = response.as_ref().ok().map(|response| response.status());
        let right = match (expected, status) {
            (Served, _) => status == Some(200),
            (Rejected, _) => status == Some(403),
            (_, None) => response.as_ref().is_err_and(is_closed),
            (Malformed, Some(status)) => ERRORS.contains(&status),
            (Truncated, Some(status)) => status >= 400,
        };
        if !right {
            wrong.push(format!("{name}: {response:?}"));
            continue;
        }
        if expected == Rejected {
            let message = response.unwrap().error_message();
            assert!(!message.contains(KEY), "{name}: {message}");
            proxy.wait_for_request("refused ", &[" status=403 ", " reason=\""]);
        }
        client.shutdown_write();
        let more = client.read_until_closed();
        let more = more.unwrap_or_else(|error| panic!("{name}: not closed: {error}"));
        let more = String::from_utf8_lossy(&more);
        assert!(
            !more.contains("HTTP/1."),
            "{name}: a second response: {more}"
        );
        sent += 1;
        served += usize::from(expected == Served);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // A valid request shows that the upstream works.
    assert_eq!(proxy.post_default().status(), 200);
    let is_outcome = |line: &&String| line.starts_with("request ") || line.starts_with("refused ");
    let log = proxy.stop().stderr;
    let lines = log.iter().filter(is_outcome).count();
    assert_eq!(lines, sent + 1, "one line each: {log:#?}");
    let mut complete = upstream.into_requests();
    complete.retain(|recorded| recorded.complete);
    assert_eq!(
        complete.len(),
        served + 1,
        "completed upstream: {complete:#?}"
    );
}

/// A request with this method and target, and a valid `Host`.
fn request(line: &str, headers: &str) -> String {
    format!("{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 2\r\n\r\n{{}}")
}

/// A request with `Host` and these header lines, and these bytes after its head.
fn post(headers: &str, rest: &str) -> String {
    format!("POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n{rest}")
}

/// A request with this request line.
fn start(line: &str) -> String {
    format!("{line}\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}")
}

/// A request in a body or after it, which must not be parsed as a request.
const HIDDEN: &str = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";

#[test]
fn rejects_other_methods() {
    let methods = "GET PUT DELETE PATCH OPTIONS TRACE QUERY post Post POSTX BREW";
    let of = |method| request(&format!("{method} /v1/responses"), "");
    check(Rejected, methods.split(' ').map(of));
    let lines = ["GET /shutdown", "OPTIONS *"];
    check(Rejected, lines.map(|line| request(line, "")));
}

#[test]
fn rejects_other_paths_and_spellings_of_the_path() {
    let targets = "/ /v1/models /v2/responses /responses /v1/responses/compact /v1/responses/resp_1 /v1/responses/ \
        /v1/responses?stream=true /v1/responses? /v1/responses;a=b /./v1/responses /v1/./responses /v1/responses/. \
        /v1/../v1/responses /v1/responses/x/.. /v1/responses/../models /v1/%2e/responses /v1/response%73 \
        /v1%2fresponses /v1/responses%3Fa=b /v1/responses%00 /v1/responses%20 /v1/responses%0d%0aX-Header:1 \
        /v1/response%2573 /V1/RESPONSES /v1/Responses //v1/responses /v1//responses /v1\\responses /v1/responsesx \
        /v1/response http://localhost/v1/responses https://api.openai.com/v1/responses \
        http://evil.example/v1/responses ftp://localhost/v1/responses /shutdown";
    let of = |target| request(&format!("POST {target}"), "");
    check(Rejected, targets.split_whitespace().map(of));
}

#[test]
fn rejects_connect() {
    let targets = ["api.openai.com:443", "localhost:80", "127.0.0.1:22"];
    let connect = |to| format!("CONNECT {to} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    check(Rejected, targets.map(connect));
}

#[test]
fn ignores_upgrades_of_a_post() {
    let h2c = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    let without_connection = "Upgrade: anything\r\n";
    check(Rejected, [request("GET /v1/responses", HANDSHAKE)]);
    let of = |headers| request("POST /v1/responses", headers);
    // A server may ignore Upgrade (RFC 9110, section 7.8).
    check(Served, [HANDSHAKE, h2c, without_connection].map(of));
}

#[test]
fn rejects_near_miss_websocket_handshakes() {
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
    // An Upgrade field in HTTP/1.0 must be ignored (RFC 9110, section 7.8).
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
    // Browsers always send Origin with a handshake, so no web page can open a WebSocket.
    let all = all.chain(BROWSERS.split('|').map(with));
    let all = all.chain(hosts).chain(bodies);
    let all: Vec<_> = all.collect();
    // Without the flag, even a valid handshake is rejected.
    check(Rejected, all.iter().cloned().chain([handshake("")]));
    check_with(&["--websocket"], Rejected, all);
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

/// Header fields that only browsers send.
const BROWSERS: &str = "Origin: https://evil.example|Origin: http://localhost:3000|Origin: null|Origin: |\
    origin: https://evil.example|Sec-Fetch-Site: cross-site|Sec-Fetch-Site: same-origin|Sec-Fetch-Site: none|\
    Connection: origin\r\nOrigin: https://evil.example";

/// Hosts other than loopback, which DNS rebinding could point to this machine. The unit tests of `exchange::filter` have
/// more cases.
const FOREIGN: &str =
    "evil.example:80|evil.localhost|127.0.0.1.evil.example|[2001:db8::1]|localhost,evil.example";

#[test]
fn rejects_browser_requests_and_non_loopback_hosts() {
    let of = |headers| request("POST /v1/responses", &format!("{headers}\r\n"));
    check(Rejected, BROWSERS.split('|').map(of));
    let to = |host| request("POST /v1/responses", "").replace("localhost", host);
    check(Rejected, FOREIGN.split('|').map(to));
    check(Served, ["LocalHost", "127.1.2.3", "[::1]:65535"].map(to));
}

#[test]
fn web_page_cannot_shut_down_the_proxy() {
    let host = "HTTP/1.1\r\nHost: localhost\r\n";
    let shutdown = |line: &str, headers: &str| format!("{line} {host}{headers}\r\n");
    let with = |header: &str| shutdown("GET /shutdown", &format!("{header}\r\n"));
    let lines = "POST /shutdown|GET /shutdown?|GET http://localhost/shutdown|GET /%73hutdown";
    let requests = lines.split('|').map(|line| shutdown(line, ""));
    let requests = requests.chain(BROWSERS.split('|').map(with));
    let to = |host: &str| shutdown("GET /shutdown", "").replace("localhost", host);
    let requests = requests.chain(FOREIGN.split('|').map(to));
    check_with(&["--http-shutdown"], Rejected, requests);
}

#[test]
fn large_rejected_body_is_drained_or_the_connection_closed() {
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
fn rejected_request_gets_no_100_and_the_next_is_served() {
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
        assert_eq!(
            client.read_head().unwrap().status(),
            403,
            "no 100 Continue before"
        );
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
fn rejected_body_is_never_parsed_as_a_request() {
    let put = |framing: &str, body: &str| post(framing, body).replace("POST", "PUT");
    let chunks = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n", HIDDEN.len());
    let requests = [
        put(&format!("Content-Length: {}\r\n", HIDDEN.len()), HIDDEN),
        put("Transfer-Encoding: chunked\r\n", &chunks),
        put("Content-Length: 100000\r\n", HIDDEN),
    ];
    check(Rejected, requests);
}

/// A request with this framing. After chunks, [`HIDDEN`] follows.
fn framed(headers: &str) -> String {
    let chunks = format!("0\r\n\r\n{HIDDEN}");
    match headers.to_ascii_lowercase().contains("encoding") {
        true => post(&format!("{headers}\r\n"), &chunks),
        false => post(&format!("{headers}\r\n"), "{}"),
    }
}

#[test]
fn rejects_invalid_content_lengths() {
    let lengths = "2, 3|2, 2||+2|-2|0x2|2.0|2 bytes|2 0|\"2\"|18446744073709551618|\
        9223372036854775808|18446744073709551613|18446744073709551615";
    let length = |length| framed(&format!("Content-Length: {length}"));
    check(Malformed, lengths.split('|').map(length));
    let fields = [
        "Content-Length: 2\r\nContent-Length: 3",
        "Content-Length : 2",
    ];
    check(Malformed, fields.map(framed));
}

#[test]
fn rejects_transfer_encodings_other_than_chunked() {
    let codings = "gzip||identity|gzip, chunked|chunked, gzip|chunked, chunked|xchunked|chunkedx|\"chunked\"|\
        chunked;a=b|chunked,|\x0bchunked";
    let coding = |coding| framed(&format!("Transfer-Encoding: {coding}"));
    check(Malformed, codings.split('|').map(coding));
    let fields = [
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding : chunked",
    ];
    check(Malformed, fields.map(framed));
    let chunked = framed("Transfer-Encoding: chunked");
    let in_http_1_0 = chunked.replace("/1.1\r\nHost", "/1.0\r\nHost");
    check(Malformed, [in_http_1_0]);
}

#[test]
fn redundant_framing_is_read_in_one_way() {
    let pad = "x".repeat(9000);
    let far_apart = format!("Transfer-Encoding: chunked\r\nX-Pad: {pad}\r\nContent-Length: 5");
    let fields = [
        "Content-Length: 5\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Transfer-Encoding: chunked\r\nContent-Length: x",
        &far_apart,
        "Content-Length: 2\r\nContent-Length: 2",
    ];
    // Chunks override a length (RFC 9112, section 6.3). The bytes after them are not parsed as a request.
    check(Served, fields.map(framed));
}

#[test]
fn rejects_invalid_chunks() {
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
    check(Truncated, all.map(of));
}

#[test]
fn rejects_invalid_request_lines() {
    let lines = "POST /v1/responses HTTP/2.0|POST /v1/responses HTTP/1.2|POST /v1/responses http/1.1|\
        POST /v1/responses HTTP/ 1.1|POST  /v1/responses HTTP/1.1|POST /v1/responses  HTTP/1.1|\
        POST /v1/responses /v1/responses HTTP/1.1|POST\t/v1/responses\tHTTP/1.1| POST /v1/responses HTTP/1.1|\
        POST  HTTP/1.1|POST v1/responses HTTP/1.1|POST /v1/responses\0 HTTP/1.1|POST /v1/responses\r HTTP/1.1|\
        POST\0 /v1/responses HTTP/1.1";
    check(Malformed, lines.split('|').map(start));
    let fragments = ["#fragment", "#"].map(|end| format!("POST /v1/responses{end} HTTP/1.1"));
    // hyper drops the fragment, so it is not forwarded.
    check(Served, fragments.map(|line| start(&line)));
}

#[test]
fn rejects_invalid_header_fields() {
    let headers = "X: a\0b|X\0: a|X: a\rb|X: a\rContent-Length: 0|\rX: a|X: a\x01b|X: a\x7fb|X: a\r\n b|X: a\r\n\tb|\
        X|: a|X Y: a|X-Hé: a|(X): a";
    let of = |header| post(&format!("{header}\r\nContent-Length: 2\r\n"), "{}");
    check(Malformed, headers.split('|').map(of));
}

#[test]
fn rejects_requests_without_exactly_one_host() {
    let hosts = "|Host: \r\n|Host: localhost\r\nHost: localhost\r\n|Host: localhost\r\nHost: evil.example\r\n";
    let well_formed = post("Content-Length: 2\r\n", "{}");
    let of = |host| well_formed.replace("Host: localhost\r\n", host);
    check(Malformed, hosts.split('|').map(of));
}

#[test]
fn rejects_other_protocols() {
    let requests = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".as_slice(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
        b"POST /v1/responses\r\n\r\n",
        b"POST /v1/responses HTTP/1.1\r\n Host: localhost\r\n\r\n",
    ];
    check(Malformed, requests);
}

#[test]
fn rejection_by_the_http_parser_is_logged_with_a_reason() {
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
    // Clients that disconnect before or during a head are not logged.
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
fn heads_are_limited_to_128_fields_and_64_kib() {
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

/// Chunks with the body `{}`.
const SMALL_CHUNKS: &str = "2\r\n{}\r\n0\r\n\r\n";

fn with_fields(headers: &str, rest: &str) -> String {
    post(&format!("{headers}\r\n"), rest)
}

// The remaining tests have further cases of request smuggling suites: framing that only some parsers recognise.

#[test]
fn unusual_valid_framing_is_served() {
    let chunked = [
        "Transfer-Encoding:chunked",
        "Transfer-Encoding:\tchunked\t",
        "Transfer-Encoding: chunKED",
        "X: a\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer_Encoding: gzip",
    ];
    check(Served, chunked.map(|f| with_fields(f, SMALL_CHUNKS)));
    let length = [
        "Content-Length:2",
        "Content-Length:\t2\t",
        "Content-Length: 02",
        "Content_Length: 99\r\nContent-Length: 2",
        "Content-Length: 2\r\nTransfer_Encoding: chunked",
        "Content-Length: 2\r\nX: a, Transfer-Encoding: chunked",
        "Content-Length: 2\r\nConnection: content-length",
    ];
    check(Served, length.map(|f| with_fields(f, "{}")));
}

#[test]
fn rejects_obscured_framing() {
    let fields = [
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
    check(Malformed, fields.map(|f| with_fields(f, "{}")));
}

/// A chunked request whose first chunk is written like this.
fn with_chunk(chunk: &str) -> String {
    with_fields(
        "Transfer-Encoding: chunked",
        &format!("{chunk}\r\n0\r\n\r\n"),
    )
}

#[test]
fn unusual_valid_chunks_are_served() {
    let chunks = [
        "2 \r\n{}",
        "2;\r\n{}",
        "2;=\r\n{}",
        "0000000000000000000002\r\n{}",
    ];
    check(Served, chunks.map(with_chunk));
}

#[test]
fn rejects_obscured_chunks() {
    let chunks = [
        "2\n{}",
        "\r\n2\r\n{}",
        "02x\r\n{}",
        "2\r\r\n{}",
        "2\r\n{}\n",
        "2_0\r\n{}",
        "\u{b2}\r\n{}",
    ];
    check(Truncated, chunks.map(with_chunk));
}
