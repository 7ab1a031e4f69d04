//! Leaving is noticed at once: a client that leaves ends the upstream's work, an upstream that breaks off breaks the
//! answer off, and where there is no answer to be had, the client is told so and nothing is sent twice.

mod support;

use std::{
    io::{self, Write},
    net::{Shutdown, TcpListener},
    sync::{Mutex, mpsc},
    thread,
};
use support::{
    AT_ONCE, Folder, PATIENCE,
    client::Client,
    proxy::{KEY, Launch},
    upstream::{Exchange, Upstream, ok},
};

#[test]
fn a_client_that_leaves_ends_the_upstream_request_at_once() {
    let (report, reports) = mpsc::channel();
    let upstream = Upstream::start(move |exchange| {
        // The first piece tells what this client is going to do.
        let piece = exchange.piece()?.unwrap();
        let outcome = match piece.as_slice() {
            b"before the answer" => {
                exchange.body()?;
                report.send("there").unwrap();
                exchange.wait_until_left()
            }
            b"in the answer" => {
                exchange.body()?;
                exchange.begin_events()?;
                exchange.chunk("data: 1\n\n")?;
                report.send("there").unwrap();
                exchange.wait_until_left()
            }
            b"in a flood" => {
                exchange.body()?;
                exchange.begin_events()?;
                report.send("there").unwrap();
                let event = "x".repeat(10_000);
                while exchange.chunk(&event).is_ok() {}
                Ok(())
            }
            _ => {
                report.send("there").unwrap();
                match exchange.body() {
                    Ok(_) => Err(io::Error::other("it came whole")),
                    Err(_) => Ok(()),
                }
            }
        };
        report
            .send(if outcome.is_ok() { "left" } else { "not left" })
            .unwrap();
        Err(io::ErrorKind::ConnectionAborted.into())
    });
    let proxy = Launch::to(&upstream).start();
    for when in [
        "before the answer",
        "in the answer",
        "in a flood",
        "while sending a body",
        "while sending chunks",
    ] {
        for how in ["closes", "resets"] {
            let mut client = Client::connect(proxy.port);
            match when {
                "while sending a body" => {
                    let head = client.post_head("Content-Length: 1000\r\n");
                    client.send(head + when).unwrap();
                }
                "while sending chunks" => {
                    let head = client.post_head("Transfer-Encoding: chunked\r\n");
                    client
                        .send(format!("{head}{:x}\r\n{when}\r\n", when.len()))
                        .unwrap();
                }
                _ => client.post("", when.as_bytes()).unwrap(),
            }
            assert_eq!(reports.recv_timeout(PATIENCE), Ok("there"), "{when}");
            if when.starts_with("in ") {
                client.head().unwrap();
                client.piece().unwrap();
            }
            match how {
                "closes" => drop(client),
                _ => client.reset(),
            }
            assert_eq!(
                reports.recv_timeout(AT_ONCE),
                Ok("left"),
                "a client that {how} {when}"
            );
        }
    }
}

#[test]
fn one_client_that_leaves_does_not_harm_another() {
    let (report, reports) = mpsc::channel();
    let (go_on, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let upstream = Upstream::start(move |exchange| {
        let leaves = exchange.body()? == b"leaves";
        exchange.begin_events()?;
        exchange.chunk("data: 1\n\n")?;
        if leaves {
            exchange.wait_until_left()?;
            report.send(()).unwrap();
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        held.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        exchange.chunk("data: 2\n\n")?;
        exchange.chunk("")
    });
    let proxy = Launch::to(&upstream).start();
    let [mut stays, mut leaves] = ["stays", "leaves"].map(|body| {
        let mut client = Client::connect(proxy.port);
        client.post("", body.as_bytes()).unwrap();
        client.head().unwrap();
        client
    });
    leaves.piece().unwrap();
    drop(leaves);
    reports.recv_timeout(AT_ONCE).unwrap();
    go_on.send(()).unwrap();
    assert_eq!(stays.rest().unwrap(), b"data: 1\n\ndata: 2\n\n");
}

/// What an upstream does in the middle of an answer.
type Break = fn(&mut Exchange<'_>) -> io::Result<()>;

const LENGTH: &str = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this";
const CHUNKS: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n";
const CONNECTION: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nonly this";

const BREAKS: [(&str, &str, Break); 10] = [
    ("a length, closed", LENGTH, |e| e.close()),
    ("a length, cut", LENGTH, |e| e.cut()),
    ("a length, reset", LENGTH, |e| e.reset()),
    ("chunks, closed", CHUNKS, |e| e.close()),
    ("chunks, cut", CHUNKS, |e| e.cut()),
    ("chunks, reset", CHUNKS, |e| e.reset()),
    ("the connection's end, cut", CONNECTION, |e| e.cut()),
    ("the connection's end, reset", CONNECTION, |e| e.reset()),
    ("a chunk, closed", CHUNKS, |exchange| {
        exchange.send("100\r\nhalf a chunk")?;
        exchange.close()
    }),
    ("a bad chunk", CHUNKS, |exchange| {
        exchange.send("what\r\n")?;
        exchange.wait_until_left()?;
        exchange.cut()
    }),
];

fn breaking() -> Upstream {
    let (head, heads) = mpsc::channel();
    let heads = Mutex::new(heads);
    // What has been sent is with the proxy before the connection breaks: the client has said so.
    Upstream::start(move |exchange| {
        let number: Option<usize> = std::str::from_utf8(exchange.body()?).unwrap().parse().ok();
        let Some(number) = number else {
            head.send(()).unwrap();
            return ok(exchange);
        };
        let (_, answer, break_off) = BREAKS[number];
        exchange.send(answer)?;
        heads.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        break_off(exchange)
    })
}

#[test]
fn an_upstream_that_breaks_off_breaks_the_answer_off() {
    let upstream = breaking();
    let proxy = Launch::to(&upstream).start();
    for (number, (name, ..)) in BREAKS.into_iter().enumerate() {
        let mut client = Client::connect(proxy.port);
        client.post("", number.to_string().as_bytes()).unwrap();
        assert_eq!(client.head().unwrap().status(), 200, "{name}");
        let mut come = Vec::new();
        while come.len() < "only this".len() {
            come.extend(client.piece().unwrap().unwrap());
        }
        assert_eq!(come, b"only this", "{name}");
        assert_eq!(
            Client::connect(proxy.port).ask().unwrap().status(),
            200,
            "{name}: another request"
        );
        let end = client.rest();
        let error = end.expect_err(name);
        assert!(support::http::is_closed(&error), "{name}: {error}");
    }
}

#[test]
fn an_upstream_that_breaks_off_resets_a_client_of_http_1_0() {
    // To such a client, the usual end of the connection is the end of a whole answer.
    let upstream = breaking();
    let proxy = Launch::to(&upstream).start();
    for (number, (name, ..)) in BREAKS.into_iter().enumerate() {
        let mut client = Client::connect(proxy.port);
        let number = number.to_string();
        let length = number.len();
        client
            .send(format!(
                "POST /v1/responses HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{number}"
            ))
            .unwrap();
        let head = client.head().unwrap();
        assert_eq!(head.status(), 200, "{name}");
        client.piece().unwrap();
        assert_eq!(
            Client::connect(proxy.port).ask().unwrap().status(),
            200,
            "{name}: another request"
        );
        client.rest().expect_err(name);
    }
}

/// Asks a proxy for an answer that it can't get.
fn assert_502(name: &str, launch: Launch, step: &str) {
    let mut proxy = launch.start();
    let mut client = Client::connect(proxy.port);
    let response = client
        .ask()
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(response.status(), 502, "{name}: {response:?}");
    let message = response.error_message();
    assert!(
        message.contains(step),
        "{name}: {step:?} is not in {message:?}"
    );
    assert!(!message.contains(KEY), "{name}: {message}");
    let line = proxy.wait_for_line(|line| line.starts_with("request "));
    assert!(
        line.contains("status=502") && !line.contains(KEY),
        "{name}: {line}"
    );
    // The client's connection and the proxy are none the worse for it.
    assert_eq!(client.ask().unwrap().status(), 502, "{name}");
}

#[test]
fn an_upstream_that_cannot_be_reached_is_a_502_that_names_the_step() {
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let to = |url: &str| Launch::new().args(["--upstream-url", url]);
    assert_502(
        "nobody listens",
        to(&format!("https://localhost:{nobody}/")),
        "connect",
    );
    assert_502(
        "nobody listens, without TLS",
        to(&format!("http://localhost:{nobody}/")),
        "connect",
    );
    assert_502("no such host", to("https://no-such-host.invalid/"), "DNS");

    // Whatever is said instead of TLS, then the end.
    let answers: [&[u8]; 4] = [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        &[0; 4000],
        b"\x15\x03\x03\x00\x02\x02\x28",
    ];
    for answer in answers {
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
        assert_502(
            &answer.escape_ascii().to_string(),
            to(&format!("https://localhost:{port}/")),
            "TLS",
        );
    }
}

#[test]
fn an_upstream_that_cannot_be_trusted_is_a_502_and_sees_nothing() {
    let both = ["localhost", "127.0.0.1"];
    let unknown = Upstream::start(ok);
    let other_name =
        Upstream::with_certificate(&["example.org", "localhost.example.org"], |_| {}, ok);
    let other_address = Upstream::with_certificate(&["127.0.0.2"], |_| {}, ok);
    let past =
        |params: &mut rcgen::CertificateParams| params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let future = |params: &mut rcgen::CertificateParams| {
        params.not_before = rcgen::date_time_ymd(4000, 1, 1)
    };
    let for_clients = |params: &mut rcgen::CertificateParams| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    };
    let expired = Upstream::with_certificate(&both, past, ok);
    let not_yet = Upstream::with_certificate(&both, future, ok);
    let client = Upstream::with_certificate(&both, for_clients, ok);
    let folder = Folder::new();
    let elsewhere = folder.join("elsewhere.pem");
    std::fs::copy(expired.authority().unwrap(), &elsewhere).unwrap();
    let url = unknown.url();
    let no_authority = || Launch::new().args(["--upstream-url", &url]);
    assert_502("no authority", no_authority(), "TLS");
    assert_502(
        "another authority",
        no_authority().arg("--upstream-ca").arg(elsewhere),
        "TLS",
    );
    for (name, upstream) in [
        ("another name", &other_name),
        ("another address", &other_address),
        ("an expired certificate", &expired),
        ("a certificate that is not valid yet", &not_yet),
        ("a certificate for clients", &client),
    ] {
        assert_502(name, Launch::to(upstream), "TLS");
    }
    for upstream in [unknown, other_name, other_address, expired, not_yet, client] {
        assert!(upstream.seen().is_empty());
    }
}

#[test]
fn an_upstream_that_never_finishes_connecting_is_a_504() {
    // The kernel makes the connection; nobody ever says a word of TLS.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let proxy = Launch::new()
        .args(["--upstream-url", &format!("https://localhost:{port}/")])
        .start();
    let mut client = Client::connect(proxy.port);
    let response = client.ask().unwrap();
    assert_eq!(response.status(), 504);
    let message = response.error_message();
    assert!(
        message.contains("connect") && !message.contains(KEY),
        "{message}"
    );
}

#[test]
fn an_answer_that_is_none_is_a_502_and_the_request_is_not_sent_again() {
    /// What an upstream says to a request, before it closes the connection.
    const ANSWERS: [(&str, &str); 16] = [
        ("nothing", ""),
        ("half a head", "HTTP/1.1 200 OK\r\nContent-Le"),
        ("another protocol", "220 mail.example ESMTP\r\n"),
        ("binary", "\0\x01\x02\x03\r\n\r\n"),
        ("no status", "HTTP/1.1 \r\n\r\n"),
        ("a status of two digits", "HTTP/1.1 20 OK\r\n\r\n"),
        ("a status of four digits", "HTTP/1.1 2000 OK\r\n\r\n"),
        (
            "another version",
            "HTTP/3.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        ),
        (
            "a header without a colon",
            "HTTP/1.1 200 OK\r\nwhat\r\n\r\n",
        ),
        (
            "a blank in a header's name",
            "HTTP/1.1 200 OK\r\nX Y: 1\r\nContent-Length: 2\r\n\r\n{}",
        ),
        (
            "a NUL in a header",
            "HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 2\r\n\r\n{}",
        ),
        (
            "two lengths",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        ),
        (
            "a length that is none",
            "HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}",
        ),
        ("a head that is too large", "large"),
        ("too many headers", "many"),
        (
            "another protocol by agreement",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        ),
    ];
    let upstream = Upstream::start(|exchange| {
        let Ok(number) = std::str::from_utf8(exchange.body()?)
            .unwrap()
            .parse::<usize>()
        else {
            return ok(exchange);
        };
        match ANSWERS[number].1 {
            "large" => exchange.send(format!(
                "HTTP/1.1 200 OK\r\nX: {}\r\n\r\n",
                "x".repeat(70_000)
            ))?,
            "many" => {
                exchange.send(format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: 1\r\n".repeat(129)))?
            }
            answer => exchange.send(answer)?,
        }
        exchange.close()
    });
    let mut proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    for (number, (name, _)) in ANSWERS.into_iter().enumerate() {
        client.post("", number.to_string().as_bytes()).unwrap();
        let response = client
            .response()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(response.status(), 502, "{name}: {response:?}");
        let message = response.error_message();
        assert!(!message.contains(KEY), "{name}: {message}");
        let line = proxy.wait_for_line(|line| line.starts_with("request "));
        assert!(
            line.contains("status=502") && !line.contains(KEY),
            "{name}: {line}"
        );
        assert_eq!(
            client.ask().unwrap().status(),
            200,
            "{name}: the next request"
        );
        proxy.wait_for_line(|line| line.starts_with("request "));
    }
    assert_eq!(upstream.seen().len(), 2 * ANSWERS.len(), "each came once");
}

#[test]
fn a_connection_that_the_upstream_has_closed_is_not_used_and_nobody_notices() {
    let (closed, closings) = mpsc::channel();
    let upstream = Upstream::start(move |exchange| {
        let properly = exchange.body()? == b"properly";
        exchange.answer("200 OK", "", b"{}")?;
        let end = if properly {
            exchange.close()
        } else {
            exchange.cut()
        };
        closed.send(()).unwrap();
        end
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    const ROUNDS: usize = 50;
    for round in 0..ROUNDS {
        for body in ["properly", "without TLS's notice"] {
            client.post("", body.as_bytes()).unwrap();
            let response = client.response().unwrap();
            assert_eq!(
                response.status(),
                200,
                "round {round}, closed {body}: {response:?}"
            );
            closings.recv_timeout(PATIENCE).unwrap();
        }
    }
    assert_eq!(upstream.seen().len(), 2 * ROUNDS, "each came once");
    assert_eq!(upstream.connections(), 2 * ROUNDS);
}

#[test]
fn a_request_that_was_sent_on_a_connection_that_then_closes_is_not_sent_again() {
    let upstream = Upstream::start(|exchange| match exchange.body()? {
        b"answer" => exchange.answer("200 OK", "", b"{}"),
        b"close" => exchange.close(),
        b"cut" => exchange.cut(),
        _ => exchange.reset(),
    });
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    for how in ["close", "cut", "reset"] {
        client.post("", b"answer").unwrap();
        assert_eq!(client.response().unwrap().status(), 200, "{how}");
        client.post("", how.as_bytes()).unwrap();
        let response = client.response().unwrap();
        assert_eq!(response.status(), 502, "{how}: {response:?}");
        response.error_message();
    }
    let bodies: Vec<_> = upstream.seen().into_iter().map(|seen| seen.body).collect();
    assert_eq!(
        bodies,
        ["answer", "close", "answer", "cut", "answer", "reset"].map(str::as_bytes)
    );
    assert_eq!(
        upstream.connections(),
        3,
        "each was sent on a connection that had been used before"
    );
}

#[test]
fn an_answer_that_comes_before_the_body_is_there_reaches_the_client() {
    let (received, answered) = mpsc::channel::<()>();
    let answered = Mutex::new(answered);
    let (report, reports) = mpsc::channel();
    let upstream = Upstream::start(move |exchange| {
        let Some(then) = exchange.head.get("x-then").map(str::to_owned) else {
            return ok(exchange);
        };
        exchange.piece()?;
        let close = if then == "close" {
            "Connection: close\r\n"
        } else {
            ""
        };
        exchange.answer("413 Content Too Large", close, b"too much")?;
        // Nothing more is read until the client has its answer, so the rest of the body gets stuck on its way.
        answered.lock().unwrap().recv_timeout(PATIENCE).unwrap();
        if then == "close" {
            return exchange.close();
        }
        // A connection over which half a request went is of no more use.
        let end = exchange.body().map(|_| ());
        report.send(end.is_err()).unwrap();
        end
    });
    let proxy = Launch::to(&upstream).start();
    for then in ["close", "stay"] {
        for header in [
            "Content-Length: 50000000\r\n",
            "Transfer-Encoding: chunked\r\n",
        ] {
            let name = format!("{header:?}, then {then}");
            let mut client = Client::connect(proxy.port);
            let head = client.post_head(&format!("X-Then: {then}\r\n{header}"));
            let mut socket = client.socket().try_clone().unwrap();
            let sender = thread::spawn(move || {
                socket.write_all(head.as_bytes())?;
                let piece = "x".repeat(10_000);
                for _ in 0..5_000 {
                    match head.contains("chunked") {
                        true => socket.write_all(format!("2710\r\n{piece}\r\n").as_bytes())?,
                        false => socket.write_all(piece.as_bytes())?,
                    }
                }
                socket.shutdown(Shutdown::Both)
            });
            let response = client
                .response()
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(
                (response.status(), response.body),
                (413, b"too much".into()),
                "{name}"
            );
            let next = Client::connect(proxy.port).ask();
            let next = next.unwrap_or_else(|error| panic!("{name}: the next request: {error}"));
            assert_eq!(next.status(), 200, "{name}: the next request");
            received.send(()).unwrap();
            if then == "stay" {
                assert_eq!(
                    reports.recv_timeout(AT_ONCE),
                    Ok(true),
                    "{name}: the connection ends"
                );
            }
            // What nobody wants may be sent or not; it must not hang.
            drop(client);
            let _ = sender.join().unwrap();
        }
    }
}
