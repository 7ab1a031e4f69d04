//! Errors of the upstream: it cannot be reached or trusted, sends an invalid response, or fails during one. The client
//! gets a generic error or a truncated response, no request is sent twice, and other requests are served.

mod support;

use std::io::{self, Write};
use std::net::{Shutdown, TcpListener};
use std::time::Instant;
use std::{fs, thread};
use support::*;

/// What an upstream does after it has read a request.
type Fault = fn(&mut UpstreamRequest<'_>) -> io::Result<()>;

/// Reads the request and returns the case that it names with `X-Case`, if any.
fn read_case(request: &mut UpstreamRequest<'_>) -> io::Result<Option<String>> {
    request.read_body()?;
    let case = request.header("x-case");
    Ok((!case.is_empty()).then_some(case))
}

/// Repeats `part` until the proxy closes the connection.
fn send_endlessly(request: &mut UpstreamRequest<'_>, start: &str, part: &str) -> io::Result<()> {
    request.send(start)?;
    let part = part.repeat(10_000 / part.len());
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        request.send(&part)?;
    }
    Ok(())
}

const INTERIM: &str = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n";

/// What an upstream does instead of a valid response, before it closes the connection.
#[rustfmt::skip]
const INVALID: &[(&str, Fault)] = &[
    ("nothing", |_| Ok(())),
    ("truncated head", |r| r.send("HTTP/1.1 200 OK\r\nContent-Le")),
    ("SMTP", |r| r.send("220 mail.example ESMTP\r\n")),
    ("binary", |r| r.send("\0\x01\x02\x03\r\n\r\n")),
    ("no status", |r| r.send("HTTP/1.1 \r\n\r\n")),
    ("status of 2 digits", |r| r.send("HTTP/1.1 20 OK\r\n\r\n")),
    ("status of 4 digits", |r| r.send("HTTP/1.1 2000 OK\r\n\r\n")),
    ("HTTP/3", |r| r.send("HTTP/3.0 200 OK\r\nContent-Length: 2\r\n\r\n{}")),
    ("field without colon", |r| r.send("HTTP/1.1 200 OK\r\nwhat\r\n\r\n")),
    ("space in field name", |r| r.send("HTTP/1.1 200 OK\r\nX Y: 1\r\nContent-Length: 2\r\n\r\n{}")),
    ("NUL in field value", |r| r.send("HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\n{}")),
    ("two lengths", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}")),
    ("length in words", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}")),
    ("gzip coding", |r| r.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n{}")),
    ("split coding", |r| r.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chun\r\nTransfer-Encoding: ked\r\n\r\n{}")),
    ("empty coding", |r| r.send("HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\nContent-Length: 2\r\n\r\n{}")),
    ("chunks in HTTP/1.0", |r| r.send("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
    ("list of lengths", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\n{}")),
    ("length with plus", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}")),
    ("negative length", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}")),
    ("hexadecimal length", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length: 0x2\r\n\r\n{}")),
    ("empty length", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n{}")),
    ("length beyond 64 bits", |r| r.send("HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551618\r\n\r\n{}")),
    ("chunked, then gzip", |r| r.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n")),
    ("gzip, then chunked", |r| r.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")),
    ("unknown coding", |r| r.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n")),
    ("chunked twice", |r| r.send(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")),
    ("NUL in field name", |r| r.send("HTTP/1.1 200 OK\r\nTransfer-Encoding\0: chunked\r\n\r\n0\r\n\r\n")),
    ("leading space", |r| r.send(" HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")),
    ("tab in status line", |r| r.send("HTTP/1.1\t200 OK\r\nContent-Length: 2\r\n\r\n{}")),
    ("upgrade", |r| r.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")),
    ("closed without close_notify", |r| r.close_abruptly()),
    ("reset", |r| r.reset()),
    ("reset in status line", |r| r.send("HTTP/1.1 2").and_then(|()| r.reset())),
    ("reset in field", |r| r.send("HTTP/1.1 200 OK\r\nX").and_then(|()| r.reset())),
    ("reset after interim response", |r| r.send(INTERIM).and_then(|()| r.reset())),
    ("130 fields", |r| r.respond("200 OK", &"X: 1\r\n".repeat(129), b"")),
    ("field of 70 kB", |r| r.respond("200 OK", &format!("X: {}\r\n", "x".repeat(70_000)), b"")),
    ("endless status line", |r| send_endlessly(r, "HTTP/1.1 200 ", "x")),
    ("endless field", |r| send_endlessly(r, "HTTP/1.1 200 OK\r\nX: ", "x")),
    ("endless fields", |r| send_endlessly(r, "HTTP/1.1 200 OK\r\n", "X: x\r\n")),
    ("endless NULs", |r| send_endlessly(r, "", "\0")),
    ("endless empty lines", |r| send_endlessly(r, "", "\r\n")),
    ("33 interim responses", |r| {
        r.send(INTERIM.repeat(33)).and_then(|()| r.respond("200 OK", "", b"{}"))
    }),
    ("endless interim responses", |r| send_endlessly(r, "", INTERIM)),
];

#[test]
fn invalid_upstream_response_returns_502_without_retry() {
    let (upstream, mut proxy) = serve(|request| {
        let Some(case) = read_case(request)? else {
            return ok(request);
        };
        find_case(INVALID, &case)(request)?;
        request.close()
    });
    let mut client = proxy.client();
    // First on new upstream connections, then on pooled ones.
    for pooled in [false, true] {
        for (name, _) in INVALID {
            if pooled {
                let status = client.post_default().unwrap().status();
                assert_eq!(status, 200, "before {name}");
                proxy.wait_for_request("request ", &["status=200"]);
            }
            let header = format!("X-Case: {name}\r\n");
            let response = client.post(&header, "{}").expect(name);
            assert_eq!(response.status(), 502, "{name}: {response:?}");
            let message = response.error_message();
            assert!(!message.contains(KEY), "{name}: {message}");
            proxy.wait_for_request("request ", &["status=502"]);
        }
    }
    assert_eq!(client.post_default().unwrap().status(), 200, "the next");
    let requests = upstream.requests();
    let connections: Vec<_> = requests.iter().map(|r| r.connection).collect();
    let (new, pooled) = (0..INVALID.len(), INVALID.len()..);
    let pooled = pooled.flat_map(|connection| [connection; 2]);
    let expected: Vec<_> = new.chain(pooled).take(connections.len()).collect();
    assert_eq!(connections, expected, "each request was sent once");
    assert_eq!(connections.len(), 3 * INVALID.len() + 1);
}

const LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this";
const CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n";
const PARTIAL_CHUNK: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nonly this";
const UNTIL_CLOSE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nonly this";

/// How an upstream fails in the middle of a response.
const TRUNCATED: &[(&str, (&str, Fault))] = &[
    ("length, closed", (LENGTH, |r| r.close())),
    ("length, no close_notify", (LENGTH, |r| r.close_abruptly())),
    ("length, reset", (LENGTH, |r| r.reset())),
    ("chunks, closed", (CHUNKS, |r| r.close())),
    ("chunks, no close_notify", (CHUNKS, |r| r.close_abruptly())),
    ("chunks, reset", (CHUNKS, |r| r.reset())),
    (
        "until close, no close_notify",
        (UNTIL_CLOSE, |r| r.close_abruptly()),
    ),
    ("until close, reset", (UNTIL_CLOSE, |r| r.reset())),
    ("partial chunk, closed", (PARTIAL_CHUNK, |r| r.close())),
    ("invalid chunk", (CHUNKS, send_invalid_chunk)),
];

fn send_invalid_chunk(request: &mut UpstreamRequest<'_>) -> io::Result<()> {
    request.send("what\r\n")?;
    request.wait_until_closed()?;
    request.close_abruptly()
}

fn serve_truncated(failures: Option<SharedReceiver<()>>) -> (Upstream, Proxy) {
    serve(move |request| {
        let Some(case) = read_case(request)? else {
            return ok(request);
        };
        let (response, fail) = find_case(TRUNCATED, &case);
        request.send(response)?;
        if let Some(failures) = &failures {
            failures.recv()?;
        }
        fail(request)
    })
}

/// Reads the head and the bytes of the body that the upstream sent before it failed.
fn read_until_failure(client: &mut Client, name: &str) {
    assert_eq!(client.read_head().expect(name).status(), 200, "{name}");
    let mut received = Vec::new();
    while received.len() < "only this".len() {
        received.extend(client.read_part().expect(name).unwrap());
    }
    assert_eq!(received, b"only this", "{name}");
}

fn send_case(proxy: &Proxy, case: &str, version: &str) -> Client {
    let mut client = proxy.client();
    let head = client.post_head(&format!("X-Case: {case}\r\n"));
    let head = head.replace("1.1\r", &format!("{version}\r"));
    client.send(head).unwrap();
    client
}

fn assert_truncated(proxy: &mut Proxy, end: io::Error, name: &str) {
    assert!(is_closed(&end), "{name}: {end}");
    proxy.wait_for_line(|line| line.contains("error=\"response truncated: "));
    let status = proxy.post_default().status();
    assert_eq!(status, 200, "{name}: the next request");
}

#[test]
fn upstream_failure_during_a_response_truncates_it() {
    let (fail, failures) = channel();
    let (_upstream, mut proxy) = serve_truncated(Some(failures));
    // In HTTP/1.0, an ordinary close would mean that the response is complete.
    for version in ["1.1", "1.0"] {
        for (case, _) in TRUNCATED {
            let name = format!("{case}, HTTP/{version}");
            let mut client = send_case(&proxy, case, version);
            read_until_failure(&mut client, &name);
            let status = proxy.post_default().status();
            assert_eq!(status, 200, "{name}: another request meanwhile");
            fail.send(()).unwrap();
            let end = client.read_rest().expect_err(&name);
            assert_truncated(&mut proxy, end, &name);
        }
    }
}

#[test]
fn upstream_failure_right_after_the_head_truncates_the_response() {
    let (_upstream, mut proxy) = serve_truncated(None);
    for (case, _) in TRUNCATED {
        let mut client = send_case(&proxy, case, "1.1");
        // A reset or an invalid chunk may stop the proxy before it has forwarded the head.
        let end = if case.ends_with("reset") || *case == "invalid chunk" {
            client.read_response().map(drop).expect_err(case)
        } else {
            read_until_failure(&mut client, case);
            client.read_rest().map(drop).expect_err(case)
        };
        assert_truncated(&mut proxy, end, case);
    }
}

#[test]
fn response_after_32_interim_responses_is_forwarded() {
    let (_upstream, proxy) = serve(|request| {
        request.read_body()?;
        request.send(INTERIM.repeat(32))?;
        request.respond("200 OK", "", b"{}")
    });
    let mut client = proxy.client();
    // The limit is per request, not per connection.
    for _ in 0..3 {
        assert_eq!(client.post_default().unwrap().status(), 200);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn http_1_0_client_gets_all_bytes_before_the_reset() {
    const LENGTH: usize = 300_000;
    let (_upstream, mut proxy) = serve(|request| {
        request.read_body()?;
        request.send("HTTP/1.1 200 OK\r\n\r\n")?;
        request.send("x".repeat(LENGTH))?;
        request.close_abruptly()
    });
    let mut client = proxy.client();
    let head = client.post_head("").replace("1.1\r", "1.0\r");
    client.send(head).unwrap();
    // The client reads nothing before the upstream has failed.
    proxy.wait_for_line(|line| line.contains("error=\"response truncated: "));
    client.read_head().unwrap();
    let mut received = 0;
    let end = loop {
        match client.read_part() {
            Ok(Some(part)) => received += part.len(),
            end => break end,
        }
    };
    assert_eq!(received, LENGTH);
    assert!(end.as_ref().is_err_and(is_closed), "{end:?}");
}

/// Checks that requests get a 502 whose message names the failed step, and that the proxy keeps serving.
fn assert_502(name: &str, command: ProxyCommand, step: &str) {
    let mut proxy = command.start();
    let mut client = proxy.client();
    // The client's connection stays open, and the proxy behaves the same again.
    for _ in 0..2 {
        let response = client.post_default().unwrap();
        assert_eq!(response.status(), 502, "{name}: {response:?}");
        let message = response.error_message();
        assert!(message.contains(step), "{name}: no {step:?} in {message:?}");
        assert!(!message.contains(KEY), "{name}: {message}");
        proxy.wait_for_request("request ", &["status=502"]);
    }
}

#[test]
fn unreachable_upstream_returns_502_naming_the_step() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    let port = closed.unwrap().port();
    let unreachable = [
        (format!("https://localhost:{port}/"), "connect"),
        (format!("http://localhost:{port}/"), "connect"),
        ("https://no-such-host.invalid/".to_owned(), "DNS"),
    ];
    // Bytes that are not a TLS handshake, then the end of the stream.
    let alert = b"\x15\x03\x03\x00\x02\x02\x28";
    let responses: [&[u8]; 4] = [b"", b"HTTP/1.1 400 No\r\n\r\n", &[0; 4000], alert];
    let no_tls = responses.map(|response| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for socket in listener.incoming() {
                let mut socket = socket.unwrap();
                let _ = socket.write_all(response);
                let _ = socket.shutdown(Shutdown::Write);
                let _ = io::copy(&mut socket, &mut io::sink());
            }
        });
        (format!("https://localhost:{port}/"), "TLS")
    });
    for (url, step) in unreachable.into_iter().chain(no_tls) {
        assert_502(&url, ProxyCommand::new().url(&url), step);
    }
}

#[test]
fn untrusted_upstream_returns_502_and_gets_no_request() {
    let with = |names: &[&str], change: fn(&mut rcgen::CertificateParams)| {
        Upstream::with_certificate(names, change, ok)
    };
    let own_names = ["localhost", "127.0.0.1"];
    let upstreams = [
        (
            "another name",
            with(&["example.org", "localhost.example.org"], |_| {}),
        ),
        ("another address", with(&["127.0.0.2"], |_| {})),
        (
            "expired",
            with(&own_names, |p| {
                p.not_after = rcgen::date_time_ymd(2020, 1, 1);
            }),
        ),
        (
            "not valid yet",
            with(&own_names, |p| {
                p.not_before = rcgen::date_time_ymd(4000, 1, 1);
            }),
        ),
        (
            "for clients only",
            with(&own_names, |params| {
                params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
            }),
        ),
    ];
    for (name, upstream) in &upstreams {
        assert_502(name, ProxyCommand::for_upstream(upstream), "TLS");
        assert!(upstream.requests().is_empty(), "{name}");
    }
    let unknown = Upstream::start(ok);
    let command = || ProxyCommand::new().url(&unknown.url());
    assert_502("unknown CA", command(), "TLS");
    let other_ca = command().trust(&upstreams[0].1);
    assert_502("another CA", other_ca, "TLS");
    assert!(unknown.requests().is_empty());
}

#[test]
fn closed_pooled_connection_is_not_reused() {
    const ROUNDS: usize = 20;
    let (notify, closed) = channel();
    let (upstream, proxy) = serve(move |request| {
        let notifies = request.read_body()? == b"with close_notify";
        request.respond("200 OK", "", b"{}")?;
        let end = if notifies {
            request.close()
        } else {
            request.close_abruptly()
        };
        notify.send(()).unwrap();
        end
    });
    let mut client = proxy.client();
    for body in ["with close_notify", "without close_notify"].repeat(ROUNDS) {
        let response = client.post("", body).unwrap();
        assert_eq!(response.status(), 200, "closed {body}: {response:?}");
        closed.recv().unwrap();
    }
    let requests = upstream.requests().len();
    assert_eq!(requests, 2 * ROUNDS, "each was sent once");
    assert_eq!(upstream.connections(), 2 * ROUNDS);
}

const POISON: &str = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";

/// Complete responses, after which an upstream sends [`POISON`].
const POISONED: &[(&str, &str)] = &[
    ("length", "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine"),
    (
        "chunks",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmine\r\n0\r\n\r\n",
    ),
    ("204", "HTTP/1.1 204 No Content\r\n\r\n"),
    ("304", "HTTP/1.1 304 Not Modified\r\n\r\n"),
];

#[test]
fn bytes_after_a_response_reach_no_client() {
    const TIMINGS: [&str; 3] = ["in one write", "with the last byte", "after the response"];
    let (release, released) = channel();
    let (notify, poisoned) = channel();
    let (upstream, proxy) = serve(move |request| {
        let Some(case) = read_case(request)? else {
            return ok(request);
        };
        let response = find_case(POISONED, &case);
        // The number of bytes sent before the last write, which ends with the poison.
        let before = match request.header("x-timing").as_str() {
            "in one write" => 0,
            "with the last byte" => response.len() - 1,
            _ => response.len(),
        };
        if before > 0 {
            request.send(&response[..before])?;
            released.recv()?;
        }
        let sent = request.send(format!("{}{POISON}", &response[before..]));
        notify.send(()).unwrap();
        sent
    });
    let mut client = proxy.client();
    for (case, response) in POISONED {
        let body = if response.contains("mine") {
            "mine"
        } else {
            ""
        };
        for timing in TIMINGS {
            let name = format!("{case}, {timing}");
            let headers = format!("X-Case: {case}\r\nX-Timing: {timing}\r\n");
            client.send_post(&headers, "{}").unwrap();
            let mut received = Vec::new();
            // The client has the first part of a body before the rest is sent. A partial head is not forwarded.
            let head_first = timing != "with the last byte" || !body.is_empty();
            if head_first {
                client.read_head().unwrap();
                received.extend(client.read_part().unwrap().unwrap_or_default());
            }
            if timing != "in one write" {
                release.send(()).unwrap();
            }
            if !head_first {
                client.read_head().unwrap();
            }
            received.extend(client.read_rest().expect(&name));
            assert_eq!(received, body.as_bytes(), "{name}");
            poisoned.recv().unwrap();
            for client in [&mut client, &mut proxy.client()] {
                let next = client.post_default().expect(&name);
                assert_eq!(next.body, b"{\"ok\":true}", "{name}: the next");
            }
        }
    }
    let poisoned = POISONED.len() * TIMINGS.len();
    let connections = upstream.connections();
    assert_eq!(connections, poisoned + 1, "no poisoned one is reused");
}

/// Sends this many bytes of an upload with this case and this framing.
fn upload(proxy: &Proxy, case: &str, framing: &str, bytes: usize) -> Client {
    let mut client = proxy.client();
    let headers = format!("X-Case: {case}\r\n{framing}\r\n");
    client.send_head(&headers).unwrap();
    let part = "x".repeat(10_000);
    for _ in 0..bytes / 10_000 {
        match framing.contains("chunked") {
            true => client.chunk(&part).expect(case),
            false => client.send(&part).expect(case),
        }
    }
    client
}

#[test]
fn early_response_reaches_a_client_that_still_uploads() {
    // The response must be larger than the proxy's socket buffers, so that it is stuck until the client reads. The
    // stand-in cannot read and write at the same time, so its own socket must hold the rest.
    let limits = fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap_or_default();
    let usual = limits.split_whitespace().last() == Some("4194304");
    let long = if usual { 5_000_000 } else { 8 };
    if !usual {
        let what = "a long response to a client that reads nothing before it has sent all";
        let why = format!("the maximum socket buffer is not 4 MiB: {limits:?}");
        skip(what, &why);
    }
    let (notify_response, response_read) = channel();
    let (notify_end, ends) = channel();
    let (_upstream, proxy) = serve(move |request| {
        let case = request.header("x-case");
        if case.is_empty() {
            return ok(request);
        }
        request.read_part()?;
        let close = ["", "Connection: close\r\n"][usize::from(case.ends_with("closes"))];
        let body = vec![b'x'; if case == "reads on" { long } else { 8 }];
        request.respond("413 Content Too Large", close, &body)?;
        // While the upstream waits, it reads nothing, so the rest of the upload is stuck.
        if case.starts_with("waits") {
            response_read.recv()?;
        }
        if case.ends_with("closes") {
            return request.close();
        }
        // The proxy must not reuse a connection with a partial request on it.
        let end = request.read_body().map(drop);
        notify_end.send(end.is_err()).unwrap();
        end
    });
    for case in ["reads on", "waits and closes", "waits and stays", "closes"] {
        for framing in ["Content-Length: 32000000", "Transfer-Encoding: chunked"] {
            // The client reads the response early or only after it has sent all.
            for bytes in [100_000, 32_000_000] {
                let name = format!("{case}, {framing}, after {bytes}");
                let mut client = upload(&proxy, case, framing, bytes);
                let response = client.read_response().expect(&name);
                if case == "closes" && response.status() == 502 {
                    // A close with unread data is a reset, which may overtake the response.
                    response.error_message();
                } else {
                    assert_eq!(response.status(), 413, "{name}");
                    let length = if case == "reads on" { long } else { 8 };
                    assert_eq!(response.body.len(), length, "{name}");
                }
                let status = proxy.post_default().status();
                assert_eq!(status, 200, "{name}: the next request");
                if case.starts_with("waits") {
                    notify_response.send(()).unwrap();
                }
                if case == "waits and stays" || case == "reads on" {
                    let ended = ends.recv_timeout(PROMPT).unwrap();
                    let closed = ended || case == "reads on";
                    assert!(closed, "{name}: the connection must be closed");
                }
            }
        }
    }
}
