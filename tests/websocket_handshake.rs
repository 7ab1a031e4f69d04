//! `--websocket` forwards a WebSocket handshake on `GET /v1/responses` with the key, and returns the upstream's response.
//! Rejected handshakes are in `request_filtering`.

mod support;

use support::*;

#[test]
fn handshake_passes_headers_both_ways_and_adds_the_key() {
    const ACCEPTED: &str = "Sec-WebSocket-Extensions: permessage-deflate\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n\
        Keep-Alive: timeout=9\r\nX-Request-Id: req_1\r\n";
    for (name, upstream) in start_tls_and_plain(|request| request.switch_protocols(ACCEPTED, b"")) {
        let url = format!("{}?api-version=1&a=%20", upstream.url());
        let command = ProxyCommand::new().trust(&upstream).url(&url);
        let mut proxy = command.arg("--websocket").start();
        let client_fields = "Authorization: Bearer theirs\r\nauthorization: again\r\nKeep-Alive: 5\r\nX-Twice: 1\r\n\
            X-Named: hop-by-hop\r\nX-Twice: 2\r\n";
        let mut client = proxy.client();
        let head = handshake(&format!("{client_fields}{CODEX_HEADERS}"));
        // Names and the token are case-insensitive (RFC 6455, section 4.2.1).
        let head = head.replace("Upgrade: websocket", "upgrade: WebSocket");
        let head = head.replace(
            "Connection: Upgrade",
            "connection: keep-alive, x-named, UPGRADE",
        );
        client.send(head).unwrap();
        let response = client.read_head().unwrap();
        assert_eq!(response.start, "HTTP/1.1 101 Switching Protocols", "{name}");
        let mut fields = response.sorted();
        fields.retain(|field| !field.starts_with("date: "));
        assert_eq!(
            fields,
            [
                "connection: Upgrade",
                "sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
                "sec-websocket-extensions: permessage-deflate",
                "set-cookie: a=1",
                "set-cookie: b=2",
                "upgrade: websocket",
                "x-request-id: req_1"
            ],
            "{name}"
        );
        let head = upstream.single_request().head;
        assert_eq!(head.start, "GET /v1/responses?api-version=1&a=%20 HTTP/1.1");
        assert_eq!(
            head.sorted(),
            [
                &format!("authorization: Bearer {KEY}"),
                "connection: Upgrade",
                &format!("host: localhost:{}", upstream.port),
                "openai-beta: responses_websockets=2026-02-06",
                "originator: codex_exec",
                "sec-websocket-extensions: permessage-deflate; client_max_window_bits",
                "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
                "sec-websocket-version: 13",
                "upgrade: websocket",
                "user-agent: codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)",
                "x-codex-beta-features: remote_compaction_v2",
                "x-twice: 1",
                "x-twice: 2",
            ],
            "{name}"
        );
        drop(client);
        proxy.wait_for_request("request uid=", &[" status=101 ", " in=0 out=0"]);
    }
}

/// An accepted handshake with the header fields that the proxy checks.
const SWITCHING: &str =
    "101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";

/// Instead of a body: the proxy responds with its own error.
const ERROR: &str = "error";

/// An upstream's response to a handshake, and the body that the client gets with the same status, or with a 502.
#[rustfmt::skip]
const RESPONSES: &[(&str, (&str, &str))] = &[
    ("401", ("401 Unauthorized\r\nContent-Length: 9\r\n\r\nno access", "no access")),
    ("chunks", ("429 Too Many Requests\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nslow\r\n0\r\n\r\n", "slow")),
    ("200", ("200 OK\r\nContent-Length: 5\r\n\r\nhello", "hello")),
    ("204", ("204 No Content\r\nUpgrade: websocket\r\n\r\n", "")),
    ("426", ("426 Upgrade Required\r\nContent-Length: 0\r\n\r\n", "")),
    ("101 without fields", ("101 Switching Protocols\r\n\r\n", ERROR)),
    ("101 without Upgrade", ("101 Switching Protocols\r\nConnection: upgrade\r\n\r\n", ERROR)),
    ("101 to h2c", ("101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", ERROR)),
];

#[test]
fn responses_other_than_a_valid_101_open_no_tunnel() {
    let upstreams = start_tls_and_plain(|request| {
        request.read_body()?;
        let case = request.header("x-case");
        if case.is_empty() {
            return ok(request);
        }
        request.send(format!("HTTP/1.1 {}", find_case(RESPONSES, &case).0))
    });
    for (transport, upstream) in upstreams {
        let mut proxy = start_with_websocket(&upstream);
        let mut client = proxy.client();
        for (number, &(case, (response, body))) in RESPONSES.iter().enumerate() {
            let name = format!("{transport}: {case}");
            let status = if body == ERROR { "502" } else { &response[..3] };
            let connections = upstream.connections();
            let head = handshake(&format!("X-Case: {case}\r\n"));
            client.send(head).unwrap();
            let received = client.read_response().expect(&name);
            let received_status = received.status().to_string();
            assert_eq!(received_status, status, "{name}: {received:?}");
            proxy.wait_for_request("request ", &[&format!(" status={status} ")]);
            if body == ERROR {
                assert!(!received.error_message().contains(KEY), "{name}");
            } else {
                assert_eq!(received.body, body.as_bytes(), "{name}");
            }
            // The client's connection stays open. The upstream's is pooled unless it was upgraded.
            let next = client.post_default().unwrap().status();
            assert_eq!(next, 200, "{name}: the next");
            proxy.wait_for_request("request ", &[" status=200 "]);
            let expected = match (number, body) {
                (0, _) => 1,
                (_, ERROR) => connections + 1,
                _ => connections,
            };
            assert_eq!(upstream.connections(), expected, "{name}");
        }
        let received = upstream.requests().len();
        assert_eq!(
            received,
            2 * RESPONSES.len(),
            "{transport}: each was sent once"
        );
    }
}

#[test]
fn post_that_offers_an_upgrade_remains_a_post() {
    let upstreams = start_tls_and_plain(|request| match request.header("x-case").as_str() {
        "ok" => ok(request),
        // Sent before the body has arrived.
        "early 101" => request.send(format!("HTTP/1.1 {SWITCHING}")),
        _ => request.switch_protocols("", b"bytes"),
    });
    for (name, upstream) in upstreams {
        let proxy = start_with_websocket(&upstream);
        for (case, status) in [("ok", 200), ("101", 502), ("early 101", 502)] {
            let mut client = proxy.client();
            let headers = format!("{HANDSHAKE}X-Case: {case}\r\nContent-Length: 10\r\n");
            let head = client.post_head(&headers);
            let body = if case == "early 101" {
                "half"
            } else {
                "0123456789"
            };
            client.send(head + body).unwrap();
            let response = client.read_response().expect(case);
            assert_eq!(response.status(), status, "{name}: {case}");
            assert_eq!(response.head.get("upgrade"), None, "{name}: {case}");
            if status == 502 {
                assert!(!response.error_message().contains(KEY), "{name}");
            }
        }
        proxy.stop();
        for recorded in upstream.into_requests() {
            assert!(
                recorded.head.start.starts_with("POST "),
                "{name}: {recorded:?}"
            );
            assert_eq!(recorded.head.get("upgrade"), None, "{name}");
        }
    }
}

#[test]
fn failed_pooled_connection_is_replaced_or_returns_502() {
    let (notify, closed) = channel();
    // Cases differ in what the upstream does with a pooled connection, before or after it gets the handshake.
    let upstream = Upstream::start(move |request| {
        let case = request.header("x-case");
        let is_handshake = request.recorded.head.start.starts_with("GET ");
        request.read_body()?;
        match (case.as_str(), is_handshake) {
            ("closes before", false) => {
                request.respond("200 OK", "", b"{}")?;
                let end = request.close();
                notify.send(()).unwrap();
                end
            }
            ("sends a 101 before", false) => {
                let response = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
                request.send(format!("{response}HTTP/1.1 {SWITCHING}poison"))
            }
            ("closes after", true) => request.close(),
            (_, true) => request.switch_protocols("", b"tunnel"),
            (_, false) => ok(request),
        }
    });
    let mut proxy = start_with_websocket(&upstream);
    for (case, status) in [
        ("closes before", 101),
        ("sends a 101 before", 101),
        ("closes after", 502),
    ] {
        let header = format!("X-Case: {case}\r\n");
        let mut client = proxy.client();
        let response = client.post(&header, "{}");
        assert_eq!(response.unwrap().status(), 200, "{case}");
        proxy.wait_for_request("request ", &[" status=200 "]);
        if case == "closes before" {
            closed.recv().unwrap();
        }
        client.send(handshake(&header)).unwrap();
        assert_eq!(client.read_head().unwrap().status(), status, "{case}");
        if status == 101 {
            assert_eq!(client.read_bytes(6).unwrap(), b"tunnel", "{case}");
        }
        drop(client);
        proxy.wait_for_request("request ", &[&format!(" status={status} ")]);
    }
    let connections: Vec<_> = upstream
        .requests()
        .iter()
        .map(|recorded| recorded.connection)
        .collect();
    assert_eq!(connections, [0, 1, 2, 3, 4, 4], "each was sent once");
}

#[test]
fn handshake_without_the_flag_is_rejected_and_names_it() {
    let (upstream, mut proxy) = serve(ok);
    for request in [
        handshake(""),
        "GET /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n".to_owned(),
    ] {
        let mut client = proxy.client();
        client.send(request).unwrap();
        let response = client.read_response().unwrap();
        assert_eq!(response.status(), 403);
        let message = response.error_message();
        assert!(message.contains("--websocket"), "{message}");
        let body = String::from_utf8(response.body).unwrap();
        assert!(body.contains("\"not_allowed\""), "{body}");
        proxy.wait_for_request("refused ", &[" status=403 "]);
    }
    proxy.stop();
    assert!(upstream.into_requests().is_empty(), "nothing is forwarded");
}

#[test]
fn handshake_with_dump_dir_gets_426_and_a_post_is_dumped() {
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let command = ProxyCommand::for_upstream(&upstream).args(["--websocket", "--dump-dir"]);
    let mut proxy = command.arg(dir.join("dumps")).start();
    let mut client = proxy.client();
    client.send(handshake("")).unwrap();
    let response = client.read_response().unwrap();
    assert_eq!(response.status(), 426);
    assert_eq!(response.head.get("upgrade"), Some("HTTP/1.1"));
    let connection = response.head.get("connection").unwrap_or_default();
    assert!(
        connection.to_ascii_lowercase().contains("upgrade"),
        "{response:?}"
    );
    response.error_message();
    proxy.wait_for_request("refused ", &[" status=426 "]);
    assert_eq!(client.post_default().unwrap().status(), 200);
    let log = proxy.stop().stderr;
    let is_logged = log[0].contains("WebSocket handshakes get 426");
    assert!(is_logged, "at startup: {log:?}");
    assert_eq!(
        upstream.into_requests().len(),
        1,
        "the handshake is not forwarded"
    );
    assert_eq!(dir.join("dumps").read_dir().unwrap().count(), 2);
}
