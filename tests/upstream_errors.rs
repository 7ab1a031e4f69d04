//! Whatever an upstream does wrong, the client gets a plain error or the upstream's own answer, nothing is sent twice,
//! others are served meanwhile, and so is the next request.

mod support;

use std::io::{self, Write};
use std::net::{Shutdown, TcpListener};
use std::time::Instant;
use std::{fs, thread};
use support::*;

/// What an upstream does once a request has come whole.
type Fault = fn(&mut UpstreamRequest<'_>) -> io::Result<()>;

/// The number of the fault that a request asks for, if it does.
fn fault_of(request: &mut UpstreamRequest<'_>) -> io::Result<Option<usize>> {
    request.read_body()?;
    Ok(request.header("x-fault").parse().ok())
}

/// Sends the same again and again, until the proxy has had enough of it.
fn without_end(request: &mut UpstreamRequest<'_>, beginning: &str, piece: &str) -> io::Result<()> {
    request.send(beginning)?;
    let piece = piece.repeat(10_000 / piece.len());
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        request.send(&piece)?;
    }
    Ok(())
}

/// What an upstream says in place of an answer before it closes the connection.
const SAYS: [&str; 31] = [
    "",
    "HTTP/1.1 200 OK\r\nContent-Le",
    "220 mail.example ESMTP\r\n",
    "\0\x01\x02\x03\r\n\r\n",
    "HTTP/1.1 \r\n\r\n",
    "HTTP/1.1 20 OK\r\n\r\n",
    "HTTP/1.1 2000 OK\r\n\r\n",
    "HTTP/3.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nwhat\r\n\r\n",
    "HTTP/1.1 200 OK\r\nX Y: 1\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chun\r\nTransfer-Encoding: ked\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: 0x2\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551618\r\n\r\n{}",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "HTTP/1.1 200 OK\r\nTransfer-Encoding\0: chunked\r\n\r\n0\r\n\r\n",
    " HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.1\t200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
];

const INTERIM: &str = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n";

/// What else it does in place of an answer.
const DOES: [Fault; 14] = [
    |e| e.close_abruptly(),
    |e| e.reset(),
    |e| e.send("HTTP/1.1 2").and_then(|()| e.reset()),
    |e| e.send("HTTP/1.1 200 OK\r\nX").and_then(|()| e.reset()),
    |e| e.send(INTERIM).and_then(|()| e.reset()),
    |e| e.respond("200 OK", &"X: 1\r\n".repeat(129), b""),
    |e| e.respond("200 OK", &format!("X: {}\r\n", "x".repeat(70_000)), b""),
    |e| without_end(e, "HTTP/1.1 200 ", "x"),
    |e| without_end(e, "HTTP/1.1 200 OK\r\nX: ", "x"),
    |e| without_end(e, "HTTP/1.1 200 OK\r\n", "X: x\r\n"),
    |e| without_end(e, "", "\0"),
    |e| without_end(e, "", "\r\n"),
    |e| {
        e.send(INTERIM.repeat(33))
            .and_then(|()| e.respond("200 OK", "", b"{}"))
    },
    |e| without_end(e, "", INTERIM),
];

#[test]
fn an_answer_that_is_none_is_a_502_and_the_request_is_not_sent_again() {
    const FAULTS: usize = SAYS.len() + DOES.len();
    let (upstream, mut proxy) = serve(|request| {
        match fault_of(request)? {
            None => return ok(request),
            Some(number) if number < SAYS.len() => request.send(SAYS[number])?,
            Some(number) => DOES[number - SAYS.len()](request)?,
        }
        request.close()
    });
    let mut client = proxy.client();
    // First on new connections, then on such as had been used before.
    for used in [false, true] {
        for number in 0..FAULTS {
            let name = format!("number {number} {:?}", SAYS.get(number));
            if used {
                assert_eq!(
                    client.post_default().unwrap().status(),
                    200,
                    "before {name}"
                );
                proxy.wait_for_request("request ", &["status=200"]);
            }
            let header = format!("X-Fault: {number}\r\n");
            let response = client.post(&header, "{}").expect(&name);
            assert_eq!(response.status(), 502, "{name}: {response:?}");
            let message = response.error_message();
            assert!(!message.contains(KEY), "{name}: {message}");
            proxy.wait_for_request("request ", &["status=502"]);
        }
    }
    assert_eq!(client.post_default().unwrap().status(), 200, "the next");
    let connections: Vec<_> = upstream
        .requests()
        .iter()
        .map(|seen| seen.connection)
        .collect();
    let (once, twice) = (0..FAULTS, FAULTS..);
    let twice = twice.flat_map(|connection| [connection; 2]);
    let expected: Vec<_> = once.chain(twice).take(connections.len()).collect();
    assert_eq!(connections, expected, "each was sent once");
}

const LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this";
const CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n";
const HALF: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\nonly this";
const CONNECTION: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nonly this";

/// What an upstream does in the middle of an answer.
const BREAKS: [(&str, &str, Fault); 10] = [
    ("a length, closed", LENGTH, |e| e.close()),
    ("a length, cut", LENGTH, |e| e.close_abruptly()),
    ("a length, reset", LENGTH, |e| e.reset()),
    ("chunks, closed", CHUNKS, |e| e.close()),
    ("chunks, cut", CHUNKS, |e| e.close_abruptly()),
    ("chunks, reset", CHUNKS, |e| e.reset()),
    ("the connection's end, cut", CONNECTION, |e| {
        e.close_abruptly()
    }),
    ("the connection's end, reset", CONNECTION, |e| e.reset()),
    ("a chunk, closed", HALF, |e| e.close()),
    ("a bad chunk", CHUNKS, |e| {
        e.send("what\r\n")?;
        e.wait_until_closed()?;
        e.close_abruptly()
    }),
];

#[test]
fn an_upstream_that_breaks_off_breaks_the_answer_off() {
    let (tell, told) = channel();
    let (_upstream, mut proxy) = serve(move |request| {
        let Some(number) = fault_of(request)? else {
            return ok(request);
        };
        let (_, answer, break_off) = BREAKS[number];
        request.send(answer)?;
        if request.header("x-when") == "later" {
            told.recv()?;
        }
        break_off(request)
    });
    // To a client of HTTP/1.0, the usual end of the connection is the end of a whole answer.
    for (version, when) in [("1.1", "later"), ("1.0", "later"), ("1.1", "at once")] {
        // What is broken at once is not even taken for an answer.
        let rows = BREAKS.len() - usize::from(when == "at once");
        for (number, (name, ..)) in BREAKS[..rows].iter().enumerate() {
            let name = format!("{name}, {when}, {version}");
            let mut client = proxy.client();
            let headers = format!("X-Fault: {number}\r\nX-When: {when}\r\n");
            let head = client.post_head(&headers);
            let head = head.replace("1.1\r", &format!("{version}\r"));
            client.send(head).unwrap();
            // A reset may overtake what was sent before it.
            let comes = when == "later" || !name.contains("reset");
            if comes {
                assert_eq!(client.read_head().expect(&name).status(), 200, "{name}");
                let mut come = Vec::new();
                while come.len() < "only this".len() {
                    come.extend(client.read_part().expect(&name).unwrap());
                }
                assert_eq!(come, b"only this", "{name}");
            }
            if when == "later" {
                assert_eq!(
                    proxy.post_default().status(),
                    200,
                    "{name}: another request"
                );
                tell.send(()).unwrap();
            }
            let end = match comes {
                true => client.read_rest().map(drop).expect_err(&name),
                false => client.read_response().map(drop).expect_err(&name),
            };
            assert!(is_closed(&end), "{name}: {end}");
            proxy.wait_for_line(|line| line.contains("error=\"response truncated: "));
            assert_eq!(
                proxy.post_default().status(),
                200,
                "{name}: the next request"
            );
        }
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
    // The count begins anew with each request of a connection.
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
    // It reads nothing before the upstream has failed.
    proxy.wait_for_line(|line| line.contains("error=\"response truncated: "));
    client.read_head().unwrap();
    let mut came = 0;
    let end = loop {
        match client.read_part() {
            Ok(Some(piece)) => came += piece.len(),
            end => break end,
        }
    };
    assert_eq!(came, LENGTH);
    assert!(end.as_ref().is_err_and(is_closed), "{end:?}");
}

/// Asks a proxy for an answer that it can't get.
fn assert_502(name: &str, command: ProxyCommand, step: &str) {
    let mut proxy = command.start();
    let mut client = proxy.client();
    // The client's connection and the proxy are none the worse for it.
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
fn an_upstream_that_cannot_be_reached_is_a_502_that_names_the_step() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    let port = nobody.unwrap().port();
    let elsewhere = [
        (format!("https://localhost:{port}/"), "connect"),
        (format!("http://localhost:{port}/"), "connect"),
        ("https://no-such-host.invalid/".to_owned(), "DNS"),
    ];
    // Whatever is said instead of TLS, then the end.
    let alert = b"\x15\x03\x03\x00\x02\x02\x28";
    let answers: [&[u8]; 4] = [b"", b"HTTP/1.1 400 No\r\n\r\n", &[0; 4000], alert];
    let no_tls = answers.map(|answer| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for socket in listener.incoming() {
                let mut socket = socket.unwrap();
                let _ = socket.write_all(answer);
                let _ = socket.shutdown(Shutdown::Write);
                let _ = io::copy(&mut socket, &mut io::sink());
            }
        });
        (format!("https://localhost:{port}/"), "TLS")
    });
    for (url, step) in elsewhere.into_iter().chain(no_tls) {
        assert_502(&url, ProxyCommand::new().url(&url), step);
    }
}

#[test]
fn an_upstream_that_cannot_be_trusted_is_a_502_and_sees_nothing() {
    let with = |names: &[&str], change: fn(&mut rcgen::CertificateParams)| {
        Upstream::with_certificate(names, change, ok)
    };
    let both = ["localhost", "127.0.0.1"];
    let upstreams = [
        with(&["example.org", "localhost.example.org"], |_| {}),
        with(&["127.0.0.2"], |_| {}),
        with(&both, |p| p.not_after = rcgen::date_time_ymd(2020, 1, 1)),
        with(&both, |p| p.not_before = rcgen::date_time_ymd(4000, 1, 1)),
        with(&both, |params| {
            params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        }),
    ];
    for (number, upstream) in upstreams.iter().enumerate() {
        assert_502(
            &format!("number {number}"),
            ProxyCommand::for_upstream(upstream),
            "TLS",
        );
        assert!(upstream.requests().is_empty());
    }
    let unknown = Upstream::start(ok);
    let command = || ProxyCommand::new().url(&unknown.url());
    assert_502("no authority", command(), "TLS");
    let another = command().trust(&upstreams[0]);
    assert_502("another authority", another, "TLS");
    assert!(unknown.requests().is_empty());
}

#[test]
fn a_connection_that_the_upstream_has_closed_is_not_used_and_nobody_notices() {
    const ROUNDS: usize = 20;
    let (tell, told) = channel();
    let (upstream, proxy) = serve(move |request| {
        let properly = request.read_body()? == b"properly";
        request.respond("200 OK", "", b"{}")?;
        let end = if properly {
            request.close()
        } else {
            request.close_abruptly()
        };
        tell.send(()).unwrap();
        end
    });
    let mut client = proxy.client();
    for body in ["properly", "without TLS's notice"].repeat(ROUNDS) {
        let response = client.post("", body).unwrap();
        assert_eq!(response.status(), 200, "closed {body}: {response:?}");
        told.recv().unwrap();
    }
    assert_eq!(upstream.requests().len(), 2 * ROUNDS, "each came once");
    assert_eq!(upstream.connections(), 2 * ROUNDS);
}

#[test]
fn what_comes_behind_an_answer_is_nobodys() {
    const POISON: &str = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison";
    const ANSWERS: [&str; 4] = [
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmine\r\n0\r\n\r\n",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 304 Not Modified\r\n\r\n",
    ];
    const WHEN: [&str; 3] = ["at once", "in pieces", "later"];
    let (go_on, held) = channel();
    let (tell, sent) = channel();
    let (upstream, proxy) = serve(move |request| {
        let Some(number) = fault_of(request)? else {
            return ok(request);
        };
        let answer = ANSWERS[number];
        // How much of the answer comes before the rest and the poison.
        let before = match request.header("x-when").as_str() {
            "at once" => 0,
            "in pieces" => answer.len() - 1,
            _ => answer.len(),
        };
        if before > 0 {
            request.send(&answer[..before])?;
            held.recv()?;
        }
        let poisoned = request.send(format!("{}{POISON}", &answer[before..]));
        tell.send(()).unwrap();
        poisoned
    });
    let mut client = proxy.client();
    for (number, answer) in ANSWERS.into_iter().enumerate() {
        let body = if answer.contains("mine") { "mine" } else { "" };
        for when in WHEN {
            let name = format!("{answer:?}, {when}");
            let headers = format!("X-Fault: {number}\r\nX-When: {when}\r\n");
            client.send_post(&headers, "{}").unwrap();
            let mut come = Vec::new();
            // What has come of a body is with the client before the rest is sent; of a head, it can't be.
            let whole_head = when != "in pieces" || !body.is_empty();
            if whole_head {
                client.read_head().unwrap();
                come.extend(client.read_part().unwrap().unwrap_or_default());
            }
            if when != "at once" {
                go_on.send(()).unwrap();
            }
            if !whole_head {
                client.read_head().unwrap();
            }
            come.extend(client.read_rest().expect(&name));
            assert_eq!(come, body.as_bytes(), "{name}");
            sent.recv().unwrap();
            for client in [&mut client, &mut proxy.client()] {
                let next = client.post_default().expect(&name);
                assert_eq!(next.body, b"{\"ok\":true}", "{name}: the next");
            }
        }
    }
    let poisoned = ANSWERS.len() * WHEN.len();
    let connections = upstream.connections();
    assert_eq!(connections, poisoned + 1, "none of them is used again");
}

/// A client that has sent this much of such a request.
fn upload(proxy: &Proxy, then: &str, header: &str, sent: usize) -> Client {
    let mut client = proxy.client();
    let headers = format!("X-Then: {then}\r\n{header}\r\n");
    client.send_head(&headers).unwrap();
    let piece = "x".repeat(10_000);
    for _ in 0..sent / 10_000 {
        match header.contains("chunked") {
            true => client.chunk(&piece).expect(then),
            false => client.send(&piece).expect(then),
        }
    }
    client
}

#[test]
fn an_answer_that_comes_before_the_body_is_there_reaches_the_client() {
    // More than the sockets hold, so that the answer is stuck until the client reads. The upstream of this test can't
    // read and write at once, and counts on its own socket to hold the rest.
    let limits = fs::read_to_string("/proc/sys/net/ipv4/tcp_wmem").unwrap_or_default();
    let usual = limits.split_whitespace().last() == Some("4194304");
    let long = if usual { 5_000_000 } else { 8 };
    if !usual {
        let what = "a long answer to a client that reads nothing before it has sent all";
        let why = format!("sockets hold another amount here than 4 MiB: {limits:?}");
        skip(what, &why);
    }
    let (answered, told) = channel();
    let (tell, ends) = channel();
    let (_upstream, proxy) = serve(move |request| {
        let then = request.header("x-then");
        if then.is_empty() {
            return ok(request);
        }
        request.read_part()?;
        let close = ["", "Connection: close\r\n"][usize::from(then.ends_with("closes"))];
        let body = vec![b'x'; if then == "reads on" { long } else { 8 }];
        request.respond("413 Content Too Large", close, &body)?;
        // Nothing more is read until the client has its answer, so the rest of the body gets stuck on its way.
        if then.starts_with("waits") {
            told.recv()?;
        }
        if then.ends_with("closes") {
            return request.close();
        }
        // A connection over which half a request went is of no more use.
        let end = request.read_body().map(drop);
        tell.send(end.is_err()).unwrap();
        end
    });
    for then in ["reads on", "waits and closes", "waits and stays", "closes"] {
        for header in ["Content-Length: 32000000", "Transfer-Encoding: chunked"] {
            // One client waits for the answer as soon as it has sent something, the other reads nothing before it has
            // sent all.
            for sent in [100_000, 32_000_000] {
                let name = format!("{then}, {header}, after {sent}");
                let mut client = upload(&proxy, then, header, sent);
                let response = client.read_response().expect(&name);
                if then == "closes" && response.status() == 502 {
                    // Who closes with data unread breaks the connection off, at times before the answer has been read.
                    response.error_message();
                } else {
                    assert_eq!(response.status(), 413, "{name}");
                    let length = if then == "reads on" { long } else { 8 };
                    assert_eq!(response.body.len(), length, "{name}");
                }
                assert_eq!(
                    proxy.post_default().status(),
                    200,
                    "{name}: the next request"
                );
                if then.starts_with("waits") {
                    answered.send(()).unwrap();
                }
                if then == "waits and stays" || then == "reads on" {
                    let ended = ends.recv_timeout(PROMPT).unwrap();
                    assert!(ended || then == "reads on", "{name}: the connection ends");
                }
            }
        }
    }
}
