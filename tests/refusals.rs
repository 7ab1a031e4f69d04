//! Nothing but a plain `POST /v1/responses` from a local program gets through, and every refusal says so.

mod support;

use support::{
    client::{Client, Response},
    proxy::{KEY, Launch},
    upstream::{Upstream, ok},
};

/// Sends one request and reads its answer.
fn answer(port: u16, request: &str) -> Response {
    let mut client = Client::connect(port);
    client.send(request).unwrap();
    client
        .response()
        .unwrap_or_else(|error| panic!("{error}: {request:?}"))
}

/// A request for this with a `Host` that is allowed.
fn request(line: &str, headers: &str) -> String {
    format!("{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: 2\r\n\r\n{{}}")
}

/// Each is answered with 403 and an error that says what is allowed, is logged, and never gets upstream.
fn assert_refused(requests: Vec<(&str, String)>) {
    let upstream = Upstream::start(ok);
    let mut proxy = Launch::to(&upstream).start();
    let count = requests.len();
    for (name, request) in requests {
        let response = answer(proxy.port, &request);
        assert_eq!(response.status(), 403, "{name}: {response:?}");
        let message = response.error_message();
        assert!(!message.contains(KEY), "{name}: {message}");
        let line = proxy
            .wait_for_line(|line| line.starts_with("refused ") || line.starts_with("request "));
        assert!(
            line.starts_with("refused ") && line.contains(" status=403 "),
            "{name}: {line}"
        );
        assert!(line.contains(" reason=\""), "{name}: {line}");
    }
    assert_eq!(
        answer(proxy.port, &request("POST /v1/responses", "")).status(),
        200
    );
    assert!(count > 0);
    proxy.stop();
    let seen = upstream.close();
    assert_eq!(seen.len(), 1, "only the allowed one got through: {seen:#?}");
}

#[test]
fn other_methods_are_refused() {
    let methods = [
        "GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY", "post", "Post", "POSTX",
        "BREW",
    ];
    assert_refused(
        methods
            .map(|method| (method, request(&format!("{method} /v1/responses"), "")))
            .into(),
    );
}

#[test]
fn head_is_refused_without_a_body() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client
        .send("HEAD /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    assert_eq!(client.head().unwrap().status(), 403);
    assert_eq!(client.until_closed().unwrap(), b"");
    proxy.stop();
    assert!(upstream.close().is_empty());
}

#[test]
fn a_large_refused_request_ends_its_connection_and_nobody_waits() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    for size in [10_000, 100_000, 1_000_000] {
        for _ in 0..20 {
            let mut client = Client::connect(proxy.port);
            let head = client.post_head(&format!("Origin: null\r\nContent-Length: {size}\r\n"));
            client.send(head + &"x".repeat(size)).unwrap();
            let response = client.response().unwrap();
            assert_eq!(response.status(), 403, "{size}");
            if response.head.get("connection") == Some("close") {
                assert_eq!(client.until_closed().unwrap(), b"", "{size}");
            } else {
                assert_eq!(client.ask().unwrap().status(), 200, "{size}: the next");
            }
        }
    }
}

#[test]
fn a_refused_request_is_not_asked_for_its_body() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    let head = client.post_head("Origin: null\r\nExpect: 100-continue\r\nContent-Length: 5\r\n");
    client.send(head).unwrap();
    assert_eq!(client.response().unwrap().status(), 403, "no 100 before");
    client.finish_sending();
    assert_eq!(client.until_closed().unwrap(), b"");
    proxy.stop();
    assert!(upstream.close().is_empty());
}

#[test]
fn other_paths_and_spellings_of_the_path_are_refused() {
    let targets = [
        ("the root", "/"),
        ("another endpoint", "/v1/models"),
        ("another version", "/v2/responses"),
        ("the upstream's path without its version", "/responses"),
        ("a path below", "/v1/responses/compact"),
        ("a stored response", "/v1/responses/resp_1"),
        ("a trailing slash", "/v1/responses/"),
        ("a query", "/v1/responses?stream=true"),
        ("an empty query", "/v1/responses?"),
        ("a path parameter", "/v1/responses;a=b"),
        ("a dot segment before", "/./v1/responses"),
        ("a dot segment within", "/v1/./responses"),
        ("a dot segment behind", "/v1/responses/."),
        ("two dots within", "/v1/../v1/responses"),
        ("two dots behind", "/v1/responses/x/.."),
        ("two dots to elsewhere", "/v1/responses/../models"),
        ("an encoded dot segment", "/v1/%2e/responses"),
        ("an encoded letter", "/v1/response%73"),
        ("an encoded slash", "/v1%2fresponses"),
        ("an encoded query", "/v1/responses%3Fa=b"),
        ("an encoded NUL", "/v1/responses%00"),
        ("an encoded space behind", "/v1/responses%20"),
        ("an encoded newline", "/v1/responses%0d%0aX-Header:1"),
        ("an encoded letter twice", "/v1/response%2573"),
        ("upper case", "/V1/RESPONSES"),
        ("one letter in upper case", "/v1/Responses"),
        ("a double slash before", "//v1/responses"),
        ("a double slash within", "/v1//responses"),
        ("a backslash", "/v1\\responses"),
        ("a longer word", "/v1/responsesx"),
        ("a shorter word", "/v1/response"),
        ("absolute form, this proxy", "http://localhost/v1/responses"),
        (
            "absolute form, the real thing",
            "https://api.openai.com/v1/responses",
        ),
        (
            "absolute form, elsewhere",
            "http://evil.example/v1/responses",
        ),
        (
            "absolute form, another scheme",
            "ftp://localhost/v1/responses",
        ),
        ("the shutdown path", "/shutdown"),
    ];
    assert_refused(
        targets
            .map(|(name, target)| (name, request(&format!("POST {target}"), "")))
            .into(),
    );
}

#[test]
fn shutdown_is_refused_unless_enabled() {
    assert_refused(vec![("shutdown", request("GET /shutdown", ""))]);
}

#[test]
fn tunnels_are_refused() {
    let websocket = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let connect = |to: &str| format!("CONNECT {to} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_refused(vec![
        ("a WebSocket", request("GET /v1/responses", websocket)),
        ("CONNECT to the real thing", connect("api.openai.com:443")),
        ("CONNECT to this proxy", connect("localhost:80")),
        ("CONNECT to elsewhere", connect("127.0.0.1:22")),
        ("OPTIONS for the server", request("OPTIONS *", "")),
    ]);
}

#[test]
fn an_offer_to_upgrade_is_ignored() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let offers = [
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
        "Upgrade: anything\r\n",
    ];
    let mut client = Client::connect(proxy.port);
    for offer in offers {
        client.post(offer, b"{}").unwrap();
        assert_eq!(client.response().unwrap().status(), 200, "{offer}");
    }
    for seen in upstream.seen() {
        for name in ["upgrade", "connection", "http2-settings"] {
            assert_eq!(seen.head.get(name), None, "{seen:?}");
        }
    }
}

#[test]
fn what_only_a_browser_sends_is_refused() {
    let headers = [
        ("an origin", "Origin: https://evil.example\r\n"),
        ("a local origin", "Origin: http://localhost:3000\r\n"),
        ("the origin of a file or a sandbox", "Origin: null\r\n"),
        ("an empty origin", "Origin: \r\n"),
        (
            "an origin in lower case",
            "origin: https://evil.example\r\n",
        ),
        ("another site", "Sec-Fetch-Site: cross-site\r\n"),
        ("the same site", "Sec-Fetch-Site: same-origin\r\n"),
        ("no site", "Sec-Fetch-Site: none\r\n"),
        (
            "an origin that Connection names",
            "Connection: origin\r\nOrigin: https://evil.example\r\n",
        ),
    ];
    let post = headers.map(|(name, headers)| (name, request("POST /v1/responses", headers)));
    assert_refused(post.into());
}

/// Hosts that a name server could have made this machine's, and what else is not this machine.
const FOREIGN_HOSTS: [(&str, &str); 14] = [
    ("another name", "evil.example"),
    ("another name with a port", "evil.example:80"),
    ("a name that ends like localhost", "evillocalhost"),
    ("a name below localhost", "evil.localhost"),
    (
        "a name that begins like localhost",
        "localhost.evil.example",
    ),
    (
        "a name that begins like an address",
        "127.0.0.1.evil.example",
    ),
    ("a name with an address in it", "127.0.0.1.nip.io"),
    ("the upstream's name", "api.openai.com"),
    ("all addresses", "0.0.0.0"),
    ("another address", "192.168.1.1"),
    ("another IPv6 address", "[2001:db8::1]"),
    ("an address as one number", "2130706433"),
    ("a user before the host", "evil@localhost"),
    ("a second host", "localhost,evil.example"),
];

#[test]
fn a_host_that_is_not_this_machine_is_refused() {
    let request = |host| {
        format!("POST /v1/responses HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{{}}")
    };
    assert_refused(
        FOREIGN_HOSTS
            .map(|(name, host)| (name, request(host)))
            .into(),
    );
}

#[test]
fn a_host_that_is_this_machine_is_served() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let port = proxy.port;
    let hosts = [
        "localhost",
        "LocalHost",
        "127.0.0.1",
        "127.1.2.3",
        "[::1]",
        "localhost:1",
        "[::1]:65535",
    ];
    for host in hosts
        .map(str::to_owned)
        .into_iter()
        .chain([format!("127.0.0.1:{port}")])
    {
        let request =
            format!("POST /v1/responses HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{{}}");
        assert_eq!(answer(port, &request).status(), 200, "{host}");
    }
}

#[test]
fn a_web_page_cannot_end_it() {
    let mut proxy = Launch::new().arg("--http-shutdown").start();
    let shutdown = |host: &str, headers: &str| {
        format!("GET /shutdown HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n")
    };
    let mut cases = vec![
        (
            "an image on a page".to_owned(),
            shutdown("localhost", "Sec-Fetch-Site: cross-site\r\n"),
        ),
        (
            "a script on a page".to_owned(),
            shutdown("localhost", "Origin: https://evil.example\r\n"),
        ),
        (
            "a form on a page".to_owned(),
            "POST /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(),
        ),
        (
            "a query".to_owned(),
            "GET /shutdown? HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(),
        ),
        (
            "absolute form".to_owned(),
            "GET http://localhost/shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(),
        ),
        (
            "an encoded letter".to_owned(),
            "GET /%73hutdown HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(),
        ),
    ];
    let foreign = FOREIGN_HOSTS.map(|(name, host)| (name.to_owned(), shutdown(host, "")));
    cases.extend(foreign);
    for (name, request) in cases {
        assert_eq!(answer(proxy.port, &request).status(), 403, "{name}");
        assert!(proxy.is_running(), "{name}");
    }
}

#[test]
fn the_body_of_a_refused_request_is_never_taken_for_a_request() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let hidden = "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}";
    let cases = [
        (
            "a known length",
            format!("Content-Length: {}\r\n\r\n{hidden}", hidden.len()),
        ),
        (
            "chunks",
            format!(
                "Transfer-Encoding: chunked\r\n\r\n{:x}\r\n{hidden}\r\n0\r\n\r\n",
                hidden.len()
            ),
        ),
        (
            "a body that does not end",
            format!("Content-Length: 100000\r\n\r\n{hidden}"),
        ),
    ];
    for (name, rest) in cases {
        let mut client = Client::connect(proxy.port);
        client
            .send(format!(
                "PUT /v1/responses HTTP/1.1\r\nHost: localhost\r\n{rest}"
            ))
            .unwrap();
        assert_eq!(client.response().unwrap().status(), 403, "{name}");
        client.finish_sending();
        assert_eq!(
            client.until_closed().unwrap(),
            b"",
            "{name}: only one answer"
        );
    }
    proxy.stop();
    assert!(upstream.close().is_empty());
}

#[test]
fn a_refused_request_does_not_harm_the_next_on_its_connection() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client.send(request("PUT /v1/responses", "")).unwrap();
    assert_eq!(client.response().unwrap().status(), 403);
    assert_eq!(client.ask().unwrap().status(), 200);
}
