//! Many clients, clients that disconnect, and clients that do not read: others are served, and no memory or descriptor
//! leaks.

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
fn idle_clients_and_partial_heads_do_not_delay_others() {
    // This process has both ends of the connections, and a client may need two descriptors.
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
    let mut partial: Vec<_> = (0..200).map(begin).collect();
    let started = Instant::now();
    assert_eq!(proxy.post_default().status(), 200);
    let took = started.elapsed();
    // It takes milliseconds. The limit allows for a busy machine.
    assert!(took < Duration::from_secs(10), "{took:?}");
    // The waiting clients are served as well.
    for (client, rest) in &mut partial {
        client.send(rest).unwrap();
        assert_eq!(client.read_response().unwrap().status(), 200);
    }
    for client in idle.iter_mut().step_by(100) {
        assert_eq!(client.post_default().unwrap().status(), 200);
    }
}

/// Checks that one more client waits while `clients` are connected, that the proxy sleeps meanwhile, and that the client is
/// served once they have left.
fn assert_client_waits(proxy: &mut Proxy, clients: [Client; 100]) {
    let mut waiting = proxy.client();
    waiting.send_post("", "{}").unwrap();
    assert_idle(proxy);
    waiting.socket().set_nonblocking(true).unwrap();
    let no_response = waiting.socket().peek(&mut [0]).unwrap_err();
    assert_eq!(no_response.kind(), ErrorKind::WouldBlock);
    waiting.socket().set_nonblocking(false).unwrap();
    assert!(proxy.is_running());
    drop(clients);
    assert_eq!(waiting.read_response().unwrap().status(), 200);
    assert_eq!(waiting.post_default().unwrap().status(), 200);
}

#[test]
fn clients_beyond_the_connection_limit_wait() {
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let command = ProxyCommand::for_upstream(&upstream).arg("--dump-dir");
    let command = command.arg(dir.join("dumps"));
    let mut proxy = limit_descriptors(command, 80, 0..0).start();
    let clients = [(); 100].map(|()| proxy.client());
    assert_client_waits(&mut proxy, clients);
    // The limit leaves descriptors for the upstream connections and the dumps of all admitted clients.
    let mut clients = [(); 100].map(|()| proxy.client());
    for client in &mut clients {
        client.send_post("Connection: close\r\n", "{}").unwrap();
    }
    for client in &mut clients {
        assert_eq!(client.read_response().unwrap().status(), 200);
    }
}

#[test]
fn clients_wait_without_busy_loop_when_descriptors_run_out() {
    let upstream = Upstream::start(ok);
    // Most descriptors are open already, so that fewer remain than the connection limit assumes.
    let command = ProxyCommand::for_upstream(&upstream);
    let mut proxy = limit_descriptors(command, 80, 20..75).start();
    let clients = [(); 100].map(|()| proxy.client());
    proxy.wait_for_line(|line| line.contains("cannot accept"));
    assert_client_waits(&mut proxy, clients);
}

#[test]
fn descriptor_limit_is_raised_to_the_hard_limit() {
    let (_, hard) = getrlimit(RLIMIT_NOFILE).unwrap();
    let command = ProxyCommand::new().pre_exec(move || Ok(setrlimit(RLIMIT_NOFILE, 64, hard)?));
    let proxy = command.start();
    let limit = process(&proxy).limits().unwrap().max_open_files;
    let raised = matches!(limit.soft_limit, LimitValue::Value(soft) if soft == hard);
    assert!(raised || hard == RLIM_INFINITY, "{limit:?}");
}

/// Sends one event, waits for the disconnect, and notifies the test of it.
fn wait_for_disconnect(request: &mut UpstreamRequest<'_>, notify: &Sender<bool>) -> io::Result<()> {
    request.start_events()?;
    request.chunk("data: 1\n\n")?;
    notify.send(request.wait_until_closed().is_ok()).unwrap();
    Err(ErrorKind::ConnectionAborted.into())
}

#[test]
fn abandoned_streams_leak_no_descriptors_or_memory() {
    const STREAMS: usize = 100;
    if !require_root("counting the proxy's descriptors") {
        return;
    }
    raise_descriptor_limit(1_000);
    let (notify, disconnected) = channel();
    let (_upstream, proxy) = serve(move |request| match request.read_body()? {
        b"stream" => wait_for_disconnect(request, &notify),
        _ => ok(request),
    });
    let mut staying = proxy.client();
    staying.post_default().unwrap();
    let before = count_descriptors(&proxy);
    let memory = [(); 5].map(|()| {
        let mut clients: Vec<_> = (0..STREAMS).map(|_| proxy.client()).collect();
        for client in &mut clients {
            client.send_post("", "stream").unwrap();
            client.read_head().unwrap();
            client.read_part().unwrap().unwrap();
        }
        // One stream uses the upstream connection that was pooled before.
        assert_eq!(count_descriptors(&proxy), before + 2 * STREAMS - 1);
        for client in clients.drain(STREAMS / 2..) {
            client.reset();
        }
        drop(clients);
        for _ in 0..STREAMS {
            assert!(disconnected.recv().unwrap());
        }
        wait_until("their descriptors are closed", || {
            staying.post_default().unwrap();
            count_descriptors(&proxy) <= before
        });
        memory_usage(&proxy).0
    });
    // A leak of 5 KiB by each of the 400 streams after the first round is detected.
    assert!(memory[4] < memory[0] + 2 * MIB, "{memory:?}");
}

#[test]
fn memory_is_constant_over_thousands_of_requests() {
    const ROUNDS: usize = 100;
    let (notify, disconnected) = channel();
    let upstream = Upstream::start(
        move |request| match request.read_body()?.to_vec().as_slice() {
            b"" if request.header("x-case") == "upstream closes" => {
                request.switch_protocols("", b"x")?;
                request.close()
            }
            b"" => echo_tunnel(request),
            b"stream" => wait_for_disconnect(request, &notify),
            b"truncated" => {
                request.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this")?;
                request.close_abruptly()
            }
            b"no response" => request.close(),
            _ => ok(request),
        },
    );
    let proxy = start_with_websocket(&upstream);
    let mut staying = proxy.client();
    let mut rounds = |count| {
        for round in 0..count {
            let case = ["client closes", "upstream closes"][round % 2];
            let mut tunnel = open_tunnel(&proxy, &format!("X-Case: {case}\r\n"));
            tunnel.send("x").unwrap();
            tunnel.read_bytes(1).unwrap();
            drop(tunnel);
            for _ in 0..5 {
                assert_eq!(staying.post_default().unwrap().status(), 200);
            }
            assert_eq!(proxy.post_default().status(), 200);
            assert_eq!(staying.post("", "no response").unwrap().status(), 502);
            assert_eq!(staying.status_of("GET /").unwrap(), 403);
            let [mut malformed, mut truncated, mut leaving] = [(); 3].map(|()| proxy.client());
            malformed.send("no HTTP\r\n\r\n").unwrap();
            malformed.read_until_closed().unwrap();
            truncated.send_post("", "truncated").unwrap();
            truncated.read_response().unwrap_err();
            leaving.send_post("", "stream").unwrap();
            leaving.read_head().unwrap();
            drop(leaving);
            assert!(disconnected.recv().unwrap());
        }
        memory_usage(&proxy).0
    };
    rounds(ROUNDS / 3);
    let (first, second) = (rounds(ROUNDS), rounds(ROUNDS));
    // A leak of 5 KiB per round of a dozen requests is detected.
    assert!(second < first + MIB / 2, "{first} bytes, then {second}");
}

/// The bytes that a sender offers to a peer that does not read, and the most that socket buffers may hold of them. With
/// usual settings of the kernel, it is less than half of that.
const OFFERED: u64 = 256 * MIB;
const STUCK: u64 = 128 * MIB;

/// Sends bytes as long as they are accepted, until it is stopped.
#[derive(Default)]
struct Flood {
    sent: AtomicU64,
    stopped: AtomicBool,
}

impl Flood {
    /// Sends until [`OFFERED`] or a stop.
    fn run(&self, mut send: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
        let part = "x".repeat(64 << 10);
        while !self.stopped.load(SeqCst) && self.sent() < OFFERED {
            send(&part)?;
            self.sent.fetch_add(part.len() as u64, SeqCst);
        }
        Ok(())
    }

    fn sent(&self) -> u64 {
        self.sent.load(SeqCst)
    }

    /// Waits until the sender is stuck, checks that the proxy has not buffered the bytes, and stops the sender.
    fn assert_gets_stuck(&self, proxy: &Proxy, before: u64) {
        wait_until("the sender has started", || self.sent() > MIB);
        wait_until_idle(proxy, || self.sent());
        assert!(self.sent() < STUCK, "{} bytes were accepted", self.sent());
        let grown = memory_usage(proxy).1.saturating_sub(before);
        assert!(grown < 8 * MIB, "memory grew by {grown} bytes");
        assert_eq!(proxy.post_default().status(), 200);
        self.stopped.store(true, SeqCst);
    }
}

#[test]
fn slow_reader_slows_the_upstream_down() {
    let flood = Arc::new(Flood::default());
    let upstream_flood = flood.clone();
    let (_upstream, proxy) = serve(move |request| {
        if request.read_body()? != b"flood" {
            return ok(request);
        }
        request.start_events()?;
        upstream_flood.run(|part| request.chunk(part))?;
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
    let (report, count) = channel();
    let flood = Arc::new(Flood::default());
    let upstream_flood = flood.clone();
    let upstream = Upstream::start(move |request| match request.header("x-case").as_str() {
        "" => ok(request),
        "client sends" => {
            request.switch_protocols("", b"")?;
            released.recv()?;
            report
                .send(request.read_until_closed()?.len() as u64)
                .unwrap();
            request.close()
        }
        _ => {
            request.switch_protocols("", b"")?;
            upstream_flood.run(|part| request.send(part))?;
            request.close()
        }
    });
    let proxy = start_with_websocket(&upstream);
    assert_eq!(proxy.post_default().status(), 200);
    let before = memory_usage(&proxy).1;
    let mut client = open_tunnel(&proxy, "X-Case: upstream sends\r\n");
    flood.assert_gets_stuck(&proxy, before);
    let received = client.read_until_closed().unwrap().len() as u64;
    assert_eq!(received, flood.sent());

    let flood = Flood::default();
    let mut client = open_tunnel(&proxy, "X-Case: client sends\r\n");
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
fn slow_upstream_slows_an_upload_down() {
    let (release, released) = channel();
    let (upstream, proxy) = serve(move |request| {
        if !request.header("x-case").is_empty() {
            released.recv()?;
        }
        ok(request)
    });
    let mut client = proxy.client();
    client.post_default().unwrap();
    let before = memory_usage(&proxy).1;
    let flood = Flood::default();
    let response = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let headers = "X-Case: flood\r\nTransfer-Encoding: chunked\r\n";
            client.send_head(headers)?;
            flood.run(|part| client.chunk(part))?;
            client.chunk("")?;
            client.read_response()
        });
        flood.assert_gets_stuck(&proxy, before);
        release.send(()).unwrap();
        sender.join().unwrap()
    });
    assert_eq!(response.unwrap().status(), 200);
    let received = upstream
        .requests()
        .into_iter()
        .find(|recorded| recorded.body != b"{}");
    assert_eq!(received.unwrap().body.len() as u64, flood.sent());
}
