//! Many clients, clients that come and go, and clients that don't read: others are served all the same, and nothing
//! is left behind.

#![cfg(target_os = "linux")]

mod support;

use nix::sys::resource::{RLIM_INFINITY, Resource::RLIMIT_NOFILE, getrlimit, setrlimit};
use procfs::process::LimitValue;
use std::io::{self, ErrorKind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, mpsc::Sender};
use std::thread;
use std::time::{Duration, Instant};
use support::*;

#[test]
fn idle_clients_and_half_sent_heads_keep_nobody_waiting() {
    // Both ends are here, and each client may need two descriptors there.
    raise_descriptor_limit(5_000);
    let (_upstream, proxy) = serve(ok);
    let mut idle: Vec<_> = (0..2_000).map(|_| proxy.client()).collect();
    let begin = |number| {
        let mut client = proxy.client();
        let head = client.post_head("Content-Length: 2\r\n");
        let (sent, rest) = head.split_at(1 + number % (head.len() - 1));
        client.send(sent).unwrap();
        (client, rest.to_owned() + "{}")
    };
    let mut half: Vec<_> = (0..200).map(begin).collect();
    let started = Instant::now();
    assert_eq!(proxy.post_default().status(), 200);
    let took = started.elapsed();
    // It takes milliseconds; a second is the promise, and the rest is for machines with other work to do.
    assert!(took < Duration::from_secs(10), "{took:?}");
    // They have not been forgotten either.
    for (client, rest) in &mut half {
        client.send(rest).unwrap();
        assert_eq!(client.read_response().unwrap().status(), 200);
    }
    for client in idle.iter_mut().step_by(100) {
        assert_eq!(client.post_default().unwrap().status(), 200);
    }
}

#[test]
fn more_clients_than_descriptors_wait_their_turn_and_it_neither_spins_nor_dies() {
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let dumps = dir.join("dumps");
    let dumping = ProxyCommand::for_upstream(&upstream)
        .arg("--dump-dir")
        .arg(&dumps);
    // The second time, most of them are taken by something that it knows nothing of.
    for (command, taken) in [
        (dumping, 0..0),
        (ProxyCommand::for_upstream(&upstream), 20..75),
    ] {
        let knows = taken.is_empty();
        let mut proxy = limit_descriptors(command, 80, taken).start();
        let clients = [(); 100].map(|()| proxy.client());
        if !knows {
            proxy.wait_for_line(|line| line.contains("cannot accept"));
        }
        let mut waiting = proxy.client();
        waiting.send_post("", "{}").unwrap();
        assert_idle(&proxy);
        waiting.socket().set_nonblocking(true).unwrap();
        let held_back = waiting.socket().peek(&mut [0]).unwrap_err();
        assert_eq!(held_back.kind(), ErrorKind::WouldBlock);
        waiting.socket().set_nonblocking(false).unwrap();
        assert!(proxy.is_running());
        drop(clients);
        assert_eq!(waiting.read_response().unwrap().status(), 200);
        assert_eq!(waiting.post_default().unwrap().status(), 200);
        if knows {
            // As many at once as find room: none fails for want of a descriptor to the upstream or for its dump.
            let mut clients = [(); 100].map(|()| proxy.client());
            for client in &mut clients {
                client.send_post("Connection: close\r\n", "{}").unwrap();
            }
            for client in &mut clients {
                assert_eq!(client.read_response().unwrap().status(), 200);
            }
        }
    }
}

#[test]
fn it_raises_its_descriptor_limit_as_far_as_it_may() {
    let (_, hard) = getrlimit(RLIMIT_NOFILE).unwrap();
    let command = ProxyCommand::new().pre_exec(move || Ok(setrlimit(RLIMIT_NOFILE, 64, hard)?));
    let proxy = command.start();
    let limit = process(&proxy).limits().unwrap().max_open_files;
    let raised = matches!(limit.soft_limit, LimitValue::Value(soft) if soft == hard);
    assert!(raised || hard == RLIM_INFINITY, "{limit:?}");
}

/// Sends one event and waits for the client to leave, which it tells.
fn abandoned(request: &mut UpstreamRequest<'_>, tell: &Sender<bool>) -> io::Result<()> {
    request.start_events()?;
    request.chunk("data: 1\n\n")?;
    tell.send(request.wait_until_closed().is_ok()).unwrap();
    Err(ErrorKind::ConnectionAborted.into())
}

#[test]
fn streams_that_are_abandoned_at_once_leave_nothing_behind() {
    const STREAMS: usize = 100;
    if !require_root("counting the proxy's descriptors") {
        return;
    }
    raise_descriptor_limit(1_000);
    let (tell, left) = channel();
    let (_upstream, proxy) = serve(move |request| match request.read_body()? {
        b"stream" => abandoned(request, &tell),
        _ => ok(request),
    });
    let mut good = proxy.client();
    good.post_default().unwrap();
    let before = count_descriptors(&proxy);
    let memory = [(); 5].map(|()| {
        let mut clients: Vec<_> = (0..STREAMS).map(|_| proxy.client()).collect();
        for client in &mut clients {
            client.send_post("", "stream").unwrap();
            client.read_head().unwrap();
            client.read_part().unwrap().unwrap();
        }
        // The first one's way to the upstream was there before.
        assert_eq!(count_descriptors(&proxy), before + 2 * STREAMS - 1);
        for client in clients.drain(STREAMS / 2..) {
            client.reset();
        }
        drop(clients);
        for _ in 0..STREAMS {
            assert!(left.recv().unwrap());
        }
        wait_until("their descriptors are closed", || {
            good.post_default().unwrap();
            count_descriptors(&proxy) <= before
        });
        memory_usage(&proxy).0
    });
    // Each of the 400 streams after the first round would have left 5 KiB or less.
    assert!(memory[4] < memory[0] + 2 * MIB, "{memory:?}");
}

#[test]
fn thousands_of_requests_leave_memory_level() {
    const ROUNDS: usize = 100;
    let (tell, left) = channel();
    let upstream = Upstream::start(
        move |request| match request.read_body()?.to_vec().as_slice() {
            b"" if request.header("x-leaves") == "upstream" => {
                request.switch_protocols("", b"x")?;
                request.close()
            }
            b"" => echo_tunnel(request),
            b"stream" => abandoned(request, &tell),
            b"break" => {
                request.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")?;
                request.close_abruptly()
            }
            b"nothing" => request.close(),
            _ => ok(request),
        },
    );
    let proxy = start_with_websocket(&upstream);
    let mut kept = proxy.client();
    let mut rounds = |count| {
        for round in 0..count {
            let leaves = ["client", "upstream"][round % 2];
            let mut tunnel = open_tunnel(&proxy, &format!("X-Leaves: {leaves}\r\n"));
            tunnel.send("x").unwrap();
            tunnel.read_bytes(1).unwrap();
            drop(tunnel);
            for _ in 0..5 {
                assert_eq!(kept.post_default().unwrap().status(), 200);
            }
            assert_eq!(proxy.post_default().status(), 200);
            assert_eq!(kept.post("", "nothing").unwrap().status(), 502);
            assert_eq!(kept.status_of("GET /").unwrap(), 403);
            let [mut malformed, mut broken, mut leaves] = [(); 3].map(|()| proxy.client());
            malformed.send("no HTTP\r\n\r\n").unwrap();
            malformed.read_until_closed().unwrap();
            broken.send_post("", "break").unwrap();
            broken.read_response().unwrap_err();
            leaves.send_post("", "stream").unwrap();
            leaves.read_head().unwrap();
            drop(leaves);
            assert!(left.recv().unwrap());
        }
        memory_usage(&proxy).0
    };
    rounds(ROUNDS / 3);
    let (half, whole) = (rounds(ROUNDS), rounds(ROUNDS));
    // Whatever each of these rounds of a dozen requests left behind, it would be less than 5 KiB.
    assert!(whole < half + MIB / 2, "{half} bytes, then {whole}");
}

/// How much is on offer to somebody who doesn't read, and how much the sockets on the way may take of it: as the
/// kernel is set up nearly everywhere, it is less than half of that.
const OFFERED: u64 = 256 * MIB;
const STUCK: u64 = 128 * MIB;

/// What goes into one end until it is told to stop.
#[derive(Default)]
struct Flood {
    sent: AtomicU64,
    enough: AtomicBool,
}

impl Flood {
    /// Sends pieces for as long as they are taken.
    fn run(&self, mut send: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
        let part = "x".repeat(64 << 10);
        while !self.enough.load(SeqCst) && self.sent() < OFFERED {
            send(&part)?;
            self.sent.fetch_add(part.len() as u64, SeqCst);
        }
        Ok(())
    }

    fn sent(&self) -> u64 {
        self.sent.load(SeqCst)
    }

    /// Waits until it is stuck, and makes sure that the proxy isn't what has taken it all.
    fn assert_gets_stuck(&self, proxy: &Proxy, before: u64) {
        wait_until("it has begun", || self.sent() > MIB);
        wait_until_idle(proxy, || self.sent());
        assert!(self.sent() < STUCK, "{} bytes went in", self.sent());
        let grown = memory_usage(&proxy).1.saturating_sub(before);
        assert!(grown < 8 * MIB, "{grown} bytes more");
        assert_eq!(proxy.post_default().status(), 200);
        self.enough.store(true, SeqCst);
    }
}

#[test]
fn a_slow_reader_of_a_fast_stream_slows_the_upstream_down() {
    let flood = Arc::new(Flood::default());
    let upstreams = flood.clone();
    let (_upstream, proxy) = serve(move |request| {
        if request.read_body()? != b"flood" {
            return ok(request);
        }
        request.start_events()?;
        upstreams.run(|part| request.chunk(part))?;
        request.chunk("")
    });
    let mut client = proxy.client();
    client.post_default().unwrap();
    let before = memory_usage(&proxy).1;
    client.send_post("", "flood").unwrap();
    client.read_head().unwrap();
    flood.assert_gets_stuck(&proxy, before);
    assert_eq!(client.read_rest().unwrap().len() as u64, flood.sent());
}

#[test]
fn websocket_with_a_slow_reader_slows_the_sender_down() {
    let (release, released) = channel();
    let (tell, count) = channel();
    let flood = Arc::new(Flood::default());
    let upstreams = flood.clone();
    let upstream = Upstream::start(move |request| match request.header("x-sends").as_str() {
        "" => ok(request),
        "client" => {
            request.switch_protocols("", b"")?;
            released.recv()?;
            tell.send(request.read_until_closed()?.len() as u64)
                .unwrap();
            request.close()
        }
        _ => {
            request.switch_protocols("", b"")?;
            upstreams.run(|part| request.send(part))?;
            request.close()
        }
    });
    let proxy = start_with_websocket(&upstream);
    assert_eq!(proxy.post_default().status(), 200);
    let before = memory_usage(&proxy).1;
    let mut client = open_tunnel(&proxy, "X-Sends: upstream\r\n");
    flood.assert_gets_stuck(&proxy, before);
    let received = client.read_until_closed().unwrap().len() as u64;
    assert_eq!(received, flood.sent());

    let flood = Flood::default();
    let mut client = open_tunnel(&proxy, "X-Sends: client\r\n");
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            flood.run(|part| client.send(part))?;
            client.shutdown_write();
            client.read_until_closed()
        });
        flood.assert_gets_stuck(&proxy, before);
        release.send(()).unwrap();
        assert_eq!(sender.join().unwrap().unwrap(), b"");
    });
    assert_eq!(count.recv().unwrap(), flood.sent());
}

#[test]
fn a_slow_upstream_slows_a_fast_upload_down() {
    let (release, released) = channel();
    let (upstream, proxy) = serve(move |request| {
        if !request.header("x-flood").is_empty() {
            released.recv()?;
        }
        ok(request)
    });
    let mut client = proxy.client();
    client.post_default().unwrap();
    let before = memory_usage(&proxy).1;
    let flood = Flood::default();
    let answer = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let headers = "X-Flood: 1\r\nTransfer-Encoding: chunked\r\n";
            client.send_head(headers)?;
            flood.run(|part| client.chunk(part))?;
            client.chunk("")?;
            client.read_response()
        });
        flood.assert_gets_stuck(&proxy, before);
        release.send(()).unwrap();
        sender.join().unwrap()
    });
    assert_eq!(answer.unwrap().status(), 200);
    let received = upstream
        .requests()
        .into_iter()
        .find(|recorded| recorded.body != b"{}");
    assert_eq!(received.unwrap().body.len() as u64, flood.sent());
}
