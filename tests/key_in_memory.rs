//! The key exists once: after 10,000 requests, all of the process's memory holds it in one place, the locked page.

#![cfg(target_os = "linux")]

mod support;

use procfs::process::{MMPermissions, VmFlags};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::{sync::Barrier, thread};
use support::*;

/// As many connections at once, each with as many requests one after the other.
const CONNECTIONS: usize = 32;

/// What comes of a request; the stand-in and the client do as it says. Nothing of the request comes back.
const CASES: [(&str, Option<u16>); 7] = [
    ("whole", Some(200)),
    ("events", Some(200)),
    ("error", Some(401)),
    ("refused", Some(403)),
    ("no answer", Some(502)),
    ("an answer that breaks off", None),
    ("an upload that is aborted", None),
];

/// Which of them a request is about, by its number. What ends a connection is dear, so it comes less often.
fn case(number: usize) -> (&'static str, Option<u16>) {
    match CASES.get(number) {
        Some(case) => *case,
        None if number.is_multiple_of(20) => CASES[number / 20 % CASES.len()],
        None => CASES[number % 4],
    }
}

/// One that takes more than the sockets on the way do of it, and is ended at the end.
const STUCK: &str = "an upload that is stuck";

fn stand_in(ended: SharedReceiver<()>) -> impl Script {
    let all_open = Barrier::new(CONNECTIONS);
    move |request: &mut UpstreamRequest<'_>| {
        let case = request.header("x-case");
        if case == STUCK {
            return ended.recv();
        }
        if request.read_body()? == b"first" {
            // As many connections as clients: none is answered before all are there.
            all_open.wait();
        }
        match case.as_str() {
            "whole" => request.respond("200 OK", "", &[b'.'; 300]),
            "error" => request.respond("401 Unauthorized", "", b"{\"error\":{}}"),
            "no answer" => request.close(),
            "an answer that breaks off" => {
                request.start_events()?;
                request.chunk("data: one\n\n")?;
                request.close_abruptly()
            }
            _ => request.respond_with_events(&["data: one\n\n", "data: two\n\n"]),
        }
    }
}

/// Makes request after request on a connection, or on a new one where the last has ended; the last is kept.
fn ask(port: u16, requests: usize) -> Client {
    let mut client = Client::connect(port);
    for number in 0..requests {
        let (case, expected) = case(number);
        // Heads of many lengths: the key never falls on the same place of a buffer.
        let padding = "p".repeat(number * 7 % 500);
        let headers = format!("X-Case: {case}\r\nX-Padding: {padding}\r\nAuthorization: mine\r\n");
        let status = match case {
            "refused" => client.status_of("GET /v1/models").ok(),
            "an upload that is aborted" => {
                let head = client.post_head(&format!("{headers}Content-Length: 1000\r\n"));
                client.send(head + "half").unwrap();
                None
            }
            _ => {
                let body = if number == 0 { "first" } else { "another" };
                client.send_post(&headers, body).unwrap();
                client
                    .read_response()
                    .ok()
                    .map(|response| response.status())
            }
        };
        assert_eq!(status, expected, "{case}");
        if status.is_none() {
            client = Client::connect(port);
        }
    }
    client
}

/// Gets an upload stuck, and ends it in the middle.
fn get_stuck(proxy: &Proxy, end: impl FnOnce()) {
    let sent = AtomicU64::new(0);
    let mut client = proxy.client();
    let socket = client.socket().try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let header = format!("X-Case: {STUCK}\r\nContent-Length: 500000000\r\n");
            client.send_head(&header).unwrap();
            let part = vec![b'x'; 1 << 16];
            while client.send(&part).is_ok() {
                sent.fetch_add(1, SeqCst);
            }
        });
        wait_until_idle(proxy, || sent.load(SeqCst));
        assert!(sent.load(SeqCst) > 0);
        socket.shutdown(std::net::Shutdown::Both).unwrap();
    });
    end();
}

/// Has the proxy do all that there is, this often on each connection, and looks for the key.
fn assert_once(is_tls: bool, requests: usize, more: impl FnOnce(ProxyCommand) -> ProxyCommand) {
    if !require_root("reading all of the proxy's memory") {
        return;
    }
    let (end, ended) = channel();
    let upstream = match is_tls {
        true => Upstream::start(stand_in(ended)),
        false => Upstream::start_plain(stand_in(ended)),
    };
    let proxy = more(ProxyCommand::for_upstream(&upstream)).start();
    let port = proxy.port;
    let clients = [(); CONNECTIONS].map(|()| thread::spawn(move || ask(port, requests)));
    // Kept, so that every connection is still there when the memory is read.
    let clients = clients.map(|client| client.join().unwrap());
    get_stuck(&proxy, || end.send(()).unwrap());
    wait_until_idle(&proxy, || 0);
    let recorded = upstream.requests();
    let bearer = format!("Bearer {KEY}");
    for recorded in &recorded {
        assert_eq!(recorded.head.all("authorization"), [&bearer]);
    }
    let complete = recorded.iter().filter(|recorded| recorded.complete).count();
    let incomplete = ["refused", "an upload that is aborted"];
    let cases = (0..requests).map(|number| case(number).0);
    let expected = cases.filter(|case| !incomplete.contains(case)).count();
    assert_eq!(complete, CONNECTIONS * expected);
    assert!(upstream.connections() >= CONNECTIONS);
    assert_once_in_memory(&proxy);
    drop(clients);
}

/// Stops the program, and looks for the key in all of its memory.
fn assert_once_in_memory(proxy: &Proxy) {
    proxy.freeze();
    let memory = Memory::read(proxy);
    let bytes = memory.bytes() as u64;
    assert!(bytes > MIB, "{bytes} bytes are not all of its memory");
    let name = memory.find(b"codex-responses-api-proxy");
    assert!(name.len() > 1, "what must be there is found");
    // The key, and any 15 bytes of it: a piece left in a buffer that was partly overwritten counts, too.
    let whole = memory.find(KEY.as_bytes());
    assert_eq!(whole.len(), 1, "the key: {whole:#?}");
    for part in KEY.as_bytes()["sk-proj-".len()..].chunks_exact(8) {
        let places = memory.find(part);
        assert_eq!(places.len(), 1, "a part of the key: {places:#?}");
    }
    let bearers = memory.find(format!("Bearer {KEY}").as_bytes());
    assert!(bearers.len() <= 1, "{bearers:#?}");

    let mapping = whole[0].0;
    let only_to_read = MMPermissions::READ | MMPermissions::PRIVATE;
    assert_eq!(mapping.perms, only_to_read, "{mapping:?}");
    assert!(mapping.extension.map["Locked"] > 0, "{mapping:?}");
    // Locked, not in dumps, not in forks.
    let flags = VmFlags::LO | VmFlags::DD | VmFlags::DC;
    assert!(mapping.extension.vm_flags.contains(flags), "{mapping:?}");
}

#[test]
fn after_10_000_requests_the_key_is_in_one_locked_page_and_nowhere_else() {
    // Even a key that is in the environment as well, as with `printenv OPENAI_API_KEY | …`.
    assert_once(true, 315, |command| {
        let command = command.env("OPENAI_API_KEY", KEY);
        command.env("OTHER", format!("a {KEY} b"))
    });
}

#[test]
fn a_key_of_any_length_that_is_in_the_environment_too_is_there_once() {
    if !require_root("reading all of the proxy's memory") {
        return;
    }
    for length in [20, 100, 132, 300, 520, 1000, 1017, 3000, 4072] {
        // No two lengths have the same parts, and no part comes twice.
        let letter = |n| char::from(b'a' + (n * n % 251 % 26) as u8);
        let key: String = (0..length).map(letter).collect();
        // With blanks before it, it is moved within its page.
        let command = ProxyCommand::new().stdin_bytes(format!(" {key}"));
        let command = command
            .url("https://localhost:9/")
            .env("OPENAI_API_KEY", &key);
        let proxy = command.env("ANOTHER", format!("{key}{key}")).start();
        proxy.freeze();
        let places = Memory::read(&proxy).find(key.as_bytes()).len();
        assert_eq!(places, 1, "{length} bytes");
    }
}

#[test]
fn neither_dumps_nor_an_upstream_without_tls_leave_it_anywhere_else() {
    let dir = TestDir::new();
    assert_once(true, 14, |command| {
        command.arg("--dump-dir").arg(dir.join("dumps"))
    });
    assert_once(false, 14, |command| command);
}

#[test]
fn a_thousand_open_websockets_hold_the_key_once() {
    const TUNNELS: usize = 1_000;
    if !require_root("reading all of the proxy's memory") {
        return;
    }
    // Both ends are here, and each tunnel may need two descriptors at either.
    raise_descriptor_limit(5_000);
    let upstream = Upstream::start(|request| match request.header("x-case").as_str() {
        "refused" => request.respond("401 Unauthorized", "", b""),
        _ => echo_tunnel(request),
    });
    let proxy = start_with_websocket(&upstream);
    let is_after_another = |number: usize| number.is_multiple_of(10);
    let begin = |number| {
        // Heads of many lengths, as above.
        let padding = "p".repeat(number * 7 % 500);
        let headers = format!("X-Padding: {padding}\r\nAuthorization: mine\r\n");
        let refused = handshake(&format!("{headers}X-Case: refused\r\n"));
        let before = if is_after_another(number) {
            &*refused
        } else {
            ""
        };
        let mut client = proxy.client();
        let head = [before, &handshake(&headers), "early"].concat();
        client.send(head).unwrap();
        client
    };
    let mut clients: Vec<_> = (0..TUNNELS).map(begin).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        if is_after_another(number) {
            assert_eq!(client.read_response().unwrap().status(), 401);
        }
        assert_eq!(client.read_head().unwrap().status(), 101);
        assert_eq!(client.read_bytes(5).unwrap(), b"early");
    }
    wait_until_idle(&proxy, || 0);
    let recorded = upstream.requests();
    assert_eq!(recorded.len(), TUNNELS + TUNNELS / 10);
    for recorded in recorded {
        let bearer = format!("Bearer {KEY}");
        assert_eq!(recorded.head.all("authorization"), [bearer]);
    }
    assert_once_in_memory(&proxy);
}
