//! Odd surroundings and hostile neighbours: a log that nobody reads, a listening socket that is broken, names and
//! addresses that are not what they seem, and what an upstream's TLS may be.

mod support;

use rustls::crypto::aws_lc_rs::{self, kx_group::X25519MLKEM768};
use rustls::version::{TLS12, TLS13};
use std::fs;
use std::path::Path;
use support::*;

#[test]
fn an_upstream_of_tls_1_2_and_one_of_hybrid_key_exchange_alone_are_served() {
    let mut hybrid = aws_lc_rs::default_provider();
    hybrid.kx_groups = vec![X25519MLKEM768];
    for (provider, version) in [(aws_lc_rs::default_provider(), &TLS12), (hybrid, &TLS13)] {
        let upstream = Upstream::with_tls(provider, &[version], &["localhost"], |_| {}, ok);
        let proxy = ProxyCommand::for_upstream(&upstream).start();
        assert_eq!(proxy.post_default().status(), 200, "{version:?}");
    }
}

#[test]
fn company_ca_is_trusted_by_flag_or_variable() {
    let (upstream, other) = (Upstream::start(ok), Upstream::start(ok));
    let (ca, other) = (upstream.ca_file().unwrap(), other.ca_file().unwrap());
    // A bundle may have certificates that are of no use.
    let dir = TestDir::new();
    let bundle = dir.join("bundle.pem");
    let unusable = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";
    fs::write(
        &bundle,
        unusable.to_owned() + &fs::read_to_string(&ca).unwrap(),
    )
    .unwrap();
    let command = |codex: &Path, ssl: &Path| {
        let command = ProxyCommand::new().url(&upstream.url());
        command
            .env("CODEX_CA_CERTIFICATE", codex)
            .env("SSL_CERT_FILE", ssl)
    };
    let unset = Path::new("");
    for (name, command, expected) in [
        ("CODEX_CA_CERTIFICATE", command(&ca, unset), 200),
        ("SSL_CERT_FILE", command(unset, &ca), 200),
        ("a bundle", command(unset, &bundle), 200),
        ("both", command(&ca, &other), 200),
        ("the other first", command(&other, &ca), 502),
        ("a flag", command(&other, &other).trust(&upstream), 200),
        ("neither", command(unset, unset), 502),
    ] {
        let mut proxy = command.start();
        assert_eq!(proxy.post_default().status(), expected, "{name}");
        let line = proxy.wait_for_request("request ", &[]);
        let names = ["--upstream-ca", "CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"];
        for source in names {
            assert_eq!(line.contains(source), name == "neither", "{name}: {line}");
        }
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use nix::sys::signal::Signal;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::process::Command;
    use std::thread;

    #[test]
    fn a_stderr_that_nobody_reads_loses_lines_and_holds_nobody_up() {
        let upstream = Upstream::start(ok);
        let (mut unread, stderr) = std::io::pipe().unwrap();
        let port = unused_port();
        let command = ProxyCommand::for_upstream(&upstream).args(["--port", &port.to_string()]);
        let into = stderr.as_raw_fd();
        let command = command.pre_exec(move || dup2(into, nix::libc::STDERR_FILENO));
        let mut proxy = command.spawn();
        drop(stderr);
        proxy.port = port;
        let listens = || TcpStream::connect(("127.0.0.1", port)).is_ok();
        wait_until("it listens", listens);
        let mut client = proxy.client();
        // A line is some 140 bytes, and a pipe holds 64 KiB (pipe(7)).
        for _ in 0..1000 {
            assert_eq!(client.status_of("GET /").unwrap(), 403);
        }
        assert_eq!(client.post_default().unwrap().status(), 200);
        unread.read_exact(&mut [0; 1 << 15]).unwrap();
        assert_eq!(client.status_of("GET /").unwrap(), 403);
        proxy.signal(Signal::SIGTERM);
        assert_eq!(proxy.wait().status.code(), Some(0));
        let mut rest = String::new();
        unread.read_to_string(&mut rest).unwrap();
        let lost = rest.matches("lines that stderr did not take").count();
        assert_eq!(lost, 1, "{rest}");
        assert!(rest.ends_with("stopped\n"), "{rest}");
    }

    /// Runs something in a network of its own, with nothing but the loopback device, whose addresses are 127.0.0.1 and
    /// 192.0.2.1. Root only.
    fn in_a_network_of_its_own(what: &'static str, run: fn(&str)) {
        if !require_root(what) {
            return;
        }
        let outcome = thread::spawn(move || {
            let unshared = unshare(CloneFlags::CLONE_NEWNET);
            unshared.map_err(|error| format!("no network of its own: {error}"))?;
            for words in ["link set lo up", "addr add 192.0.2.1/32 dev lo"] {
                let done = Command::new("ip").args(words.split(' ')).status();
                let done = done.is_ok_and(|status| status.success());
                done.then_some(()).ok_or("no `ip` (iproute2)")?;
            }
            run(what);
            Ok::<_, String>(())
        });
        if let Err(why) = outcome.join().unwrap() {
            skip(what, &why);
        }
    }

    #[test]
    fn a_peer_whose_address_is_not_loopback_is_dropped() {
        in_a_network_of_its_own("a peer with another address", |_| {
            let upstream = Upstream::start(ok);
            let proxy = ProxyCommand::for_upstream(&upstream).start();
            // As a neighbour's comes in where `route_localnet` is on.
            let (kind, close) = (SockType::Stream, SockFlag::SOCK_CLOEXEC);
            let neighbour = socket(AddressFamily::Inet, kind, close, None).unwrap();
            bind(neighbour.as_raw_fd(), &SockaddrIn::new(192, 0, 2, 1, 0)).unwrap();
            let to = SockaddrIn::new(127, 0, 0, 1, proxy.port);
            connect(neighbour.as_raw_fd(), &to).unwrap();
            let mut neighbour = TcpStream::from(neighbour);
            neighbour.set_read_timeout(Some(TIMEOUT)).unwrap();
            let _ = neighbour.write_all(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\n\r\n");
            let mut received = Vec::new();
            let end = neighbour.read_to_end(&mut received);
            assert!(end.as_ref().err().is_none_or(is_closed), "{end:?}");
            assert_eq!(received, b"");
            assert_eq!(proxy.post_default().status(), 200);
            assert_eq!(upstream.requests().len(), 1);
        });
    }

    #[test]
    fn a_localhost_that_is_elsewhere_gets_nothing() {
        in_a_network_of_its_own("a localhost that is elsewhere", |what| {
            let elsewhere = TcpListener::bind("192.0.2.1:0").unwrap();
            let port = elsewhere.local_addr().unwrap().port();
            let url = format!("http://localhost:{port}/");
            let dir = TestDir::new();
            let hosts = dir.join("hosts");
            fs::write(&hosts, "192.0.2.1 localhost\n").unwrap();
            let mounts = vec![Mount::File(hosts, "/etc/hosts".into())];
            let Some(mut proxy) = start_with_mounts(what, ProxyCommand::new().url(&url), mounts)
            else {
                return;
            };
            assert_eq!(proxy.post_default().status(), 502);
            let words = ["status=502", "is not a loopback address"];
            proxy.wait_for_request("request ", &words);
            let mut received = Vec::new();
            let end = elsewhere.accept().unwrap().0.read_to_end(&mut received);
            assert!(end.as_ref().err().is_none_or(is_closed), "{end:?}");
            assert_eq!(received, b"");
        });
    }
}
