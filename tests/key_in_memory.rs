//! The key exists once in the process's memory, in a locked page, even after 10,000 requests.

#![cfg(target_os = "linux")]

mod support;

use procfs::process::{MMPermissions, VmFlags};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::{sync::Barrier, thread};
use support::*;

/// The number of concurrent connections, each with many sequential requests.
const CONNECTIONS: usize = 32;

/// Cases by name, with the status of the response. Stand-in and client act accordingly. No response repeats the request.
const CASES: [(&str, Option<u16>); 7] = [
    ("complete", Some(200)),
    ("events", Some(200)),
    ("error", Some(401)),
    ("rejected", Some(403)),
    ("no response", Some(502)),
    ("truncated response", None),
    ("aborted upload", None),
];

/// The case of the request with this number. Cases that close a connection are slow, so they are less frequent.
fn case(number: usize) -> (&'static str, Option<u16>) {
    match CASES.get(number) {
        Some(case) => *case,
        None if number.is_multiple_of(20) => CASES[number / 20 % CASES.len()],
        None => CASES[number % 4],
    }
}

/// A case for an upload that fills all socket buffers. The test aborts it at its end.
const STUCK: &str = "stuck upload";

fn stand_in(aborted: SharedReceiver<()>) -> impl Script {
    let all_open = Barrier::new(CONNECTIONS);
    move |request: &mut UpstreamRequest<'_>| {
        let case = request.header("x-case");
        if case == STUCK {
            return aborted.recv();
        }
        if request.read_body()? == b"first" {
            // No response before all clients have sent a request: this opens one connection for each client.
            all_open.wait();
        }
        match case.as_str() {
            "complete" => request.respond("200 OK", "", &[b'.'; 300]),
            "error" => request.respond("401 Unauthorized", "", b"{\"error\":{}}"),
            "no response" => request.close(),
            "truncated response" => {
                request.start_events()?;
                request.chunk("data: one\n\n")?;
                request.close_abruptly()
            }
            _ => request.respond_with_events(&["data: one\n\n", "data: two\n\n"]),
        }
    }
}

/// Sends requests one after the other, on a new connection if the last one was closed. Returns the last connection.
fn send_requests(port: u16, requests: usize) -> Client {
    let mut client = Client::connect(port);
    for number in 0..requests {
        let (case, expected) = case(number);
        // Heads of different lengths put the key at different offsets in buffers.
        let padding = "p".repeat(number * 7 % 500);
        let headers = format!("X-Case: {case}\r\nX-Padding: {padding}\r\nAuthorization: mine\r\n");
        let status = match case {
            "rejected" => client.status_of("GET /v1/models").ok(),
            "aborted upload" => {
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

/// Sends an upload until it is stuck, and aborts it.
fn abort_stuck_upload(proxy: &Proxy, release: impl FnOnce()) {
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
    release();
}

/// Runs all cases, with this many requests on each connection, and checks that the key is in memory once.
fn assert_once_after_requests(
    is_tls: bool,
    requests: usize,
    extend: impl FnOnce(ProxyCommand) -> ProxyCommand,
) {
    if !require_root("reading all of the proxy's memory") {
        return;
    }
    let (abort, aborted) = channel();
    let upstream = match is_tls {
        true => Upstream::start(stand_in(aborted)),
        false => Upstream::start_plain(stand_in(aborted)),
    };
    let proxy = extend(ProxyCommand::for_upstream(&upstream)).start();
    let port = proxy.port;
    let clients = [(); CONNECTIONS].map(|()| thread::spawn(move || send_requests(port, requests)));
    // All connections stay open while the memory is read.
    let clients = clients.map(|client| client.join().unwrap());
    abort_stuck_upload(&proxy, || abort.send(()).unwrap());
    wait_until_idle(&proxy, || 0);
    let recorded = upstream.requests();
    let bearer = format!("Bearer {KEY}");
    for recorded in &recorded {
        assert_eq!(recorded.head.all("authorization"), [&bearer]);
    }
    let complete = recorded.iter().filter(|recorded| recorded.complete).count();
    let incomplete = ["rejected", "aborted upload"];
    let cases = (0..requests).map(|number| case(number).0);
    let expected = cases.filter(|case| !incomplete.contains(case)).count();
    assert_eq!(complete, CONNECTIONS * expected);
    assert!(upstream.connections() >= CONNECTIONS);
    assert_once_in_memory(&proxy);
    drop(clients);
}

/// Freezes the program and checks that its memory contains the key once, in a locked page.
fn assert_once_in_memory(proxy: &Proxy) {
    proxy.freeze();
    let memory = Memory::read(proxy);
    let bytes = memory.bytes() as u64;
    assert!(bytes > MIB, "only {bytes} bytes of memory were read");
    let name = memory.find(b"codex-responses-api-proxy");
    assert!(
        name.len() > 1,
        "the search does not find strings that are present"
    );
    // Any 15 bytes of the key contain one of these parts, so a copy that is partly overwritten is found, too.
    let whole = memory.find(KEY.as_bytes());
    assert_eq!(whole.len(), 1, "the key: {whole:#?}");
    for part in KEY.as_bytes()["sk-proj-".len()..].chunks_exact(8) {
        let matches = memory.find(part);
        assert_eq!(matches.len(), 1, "a part of the key: {matches:#?}");
    }
    let bearers = memory.find(format!("Bearer {KEY}").as_bytes());
    assert!(bearers.len() <= 1, "{bearers:#?}");

    let mapping = whole[0].0;
    let read_only = MMPermissions::READ | MMPermissions::PRIVATE;
    assert_eq!(mapping.perms, read_only, "{mapping:?}");
    assert!(mapping.extension.map["Locked"] > 0, "{mapping:?}");
    // Locked, excluded from core dumps, not inherited by forks.
    let flags = VmFlags::LO | VmFlags::DD | VmFlags::DC;
    assert!(mapping.extension.vm_flags.contains(flags), "{mapping:?}");
}

#[test]
fn key_is_in_one_locked_page_after_10_000_requests() {
    // The key is in the environment as well, as with `printenv OPENAI_API_KEY | …`.
    assert_once_after_requests(true, 315, |command| {
        let command = command.env("OPENAI_API_KEY", KEY);
        command.env("OTHER", format!("a {KEY} b"))
    });
}

#[test]
fn key_in_the_environment_too_is_in_memory_once() {
    if !require_root("reading all of the proxy's memory") {
        return;
    }
    for length in [20, 100, 132, 300, 520, 1000, 1017, 3000, 4072] {
        // Keys of different lengths share no part, and no part occurs twice.
        let letter = |n| char::from(b'a' + (n * n % 251 % 26) as u8);
        let key: String = (0..length).map(letter).collect();
        // The leading space is trimmed, so the key is moved within its page.
        let command = ProxyCommand::new().stdin_bytes(format!(" {key}"));
        let command = command
            .url("https://localhost:9/")
            .env("OPENAI_API_KEY", &key);
        let proxy = command.env("ANOTHER", format!("{key}{key}")).start();
        proxy.freeze();
        let count = Memory::read(&proxy).find(key.as_bytes()).len();
        assert_eq!(count, 1, "{length} bytes");
    }
}

#[test]
fn key_is_in_memory_once_with_dumps_or_a_plain_upstream() {
    let dir = TestDir::new();
    assert_once_after_requests(true, 14, |command| {
        command.arg("--dump-dir").arg(dir.join("dumps"))
    });
    assert_once_after_requests(false, 14, |command| command);
}

#[test]
fn key_is_in_memory_once_with_a_thousand_websockets() {
    const TUNNELS: usize = 1_000;
    if !require_root("reading all of the proxy's memory") {
        return;
    }
    // This process has both ends of the connections, and a tunnel may need two descriptors for each.
    raise_descriptor_limit(5_000);
    let upstream = Upstream::start(|request| match request.header("x-case").as_str() {
        "rejected" => request.respond("401 Unauthorized", "", b""),
        _ => echo_tunnel(request),
    });
    let proxy = start_with_websocket(&upstream);
    let has_rejected_first = |number: usize| number.is_multiple_of(10);
    let begin = |number| {
        // Different lengths, as above.
        let padding = "p".repeat(number * 7 % 500);
        let headers = format!("X-Padding: {padding}\r\nAuthorization: mine\r\n");
        let rejected = handshake(&format!("{headers}X-Case: rejected\r\n"));
        let before = if has_rejected_first(number) {
            &*rejected
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
        if has_rejected_first(number) {
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
