//! `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` decide how the upstream is reached. An outbound proxy never sees the key.

mod support;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use support::*;

/// An HTTP proxy that responds to CONNECT, and opens a tunnel if the response is a 2xx.
struct Tunnels {
    url: String,
    /// All bytes received from the program, by connection.
    received: Arc<Mutex<Vec<String>>>,
}

impl Tunnels {
    fn start(response: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let received = Arc::new(Mutex::new(Vec::new()));
        let record = received.clone();
        thread::spawn(move || {
            for (number, client) in listener.incoming().enumerate() {
                record.lock().unwrap().push(String::new());
                let record = record.clone();
                thread::spawn(move || {
                    let note = |bytes: &[u8]| {
                        record.lock().unwrap()[number] += &String::from_utf8_lossy(bytes);
                    };
                    Self::serve(client?, response, note)
                });
            }
        });
        Self { url, received }
    }

    fn serve(client: TcpStream, response: &str, note: impl Fn(&[u8])) -> io::Result<()> {
        client.set_read_timeout(Some(TIMEOUT))?;
        let (mut from_client, mut to_client) = (&client, &client);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            from_client.read_exact(&mut byte)?;
            head.extend_from_slice(&byte);
        }
        note(&head);
        // In two writes, like a slow proxy.
        let (first, second) = response.split_at(response.len() / 2);
        to_client.write_all(first.as_bytes())?;
        to_client.write_all(second.as_bytes())?;
        if !response.contains(" 2") {
            return Ok(());
        }
        let head = String::from_utf8(head).unwrap();
        let server = TcpStream::connect(head.split(' ').nth(1).unwrap())?;
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ = io::copy(&mut &server, &mut &client);
                let _ = client.shutdown(Shutdown::Write);
            });
            let mut part = [0; 65536];
            while let Ok(got @ 1..) = from_client.read(&mut part) {
                note(&part[..got]);
                (&server).write_all(&part[..got])?;
            }
            server.shutdown(Shutdown::Write)
        })
    }

    fn received(&self) -> Vec<String> {
        self.received.lock().unwrap().clone()
    }
}

const ESTABLISHED: &str = "HTTP/1.1 200 Connection established\r\nVia: tunnels\r\n\r\n";

#[test]
fn upstream_is_reached_through_the_configured_proxy() {
    for (variable, user) in [
        ("HTTPS_PROXY", ""),
        ("https_proxy", "user:p%40ss@"),
        ("ALL_PROXY", "user:p%40ss@"),
        ("all_proxy", ""),
    ] {
        let upstream = Upstream::start(ok);
        let tunnels = Tunnels::start(ESTABLISHED);
        let url = tunnels.url.replace("//", &format!("//{user}"));
        let proxy = ProxyCommand::for_upstream(&upstream)
            .env(variable, url)
            .start();
        let mut client = proxy.client();
        for _ in 0..3 {
            assert_eq!(client.post_default().unwrap().status(), 200, "{variable}");
        }
        let received = tunnels.received();
        let [all] = received.as_slice() else {
            panic!("{variable}: expected one tunnel: {received:#?}");
        };
        let connect = format!("CONNECT localhost:{} HTTP/1.1\r\n", upstream.port);
        assert!(all.starts_with(&connect), "{variable}: {all}");
        let head = all.split("\r\n\r\n").next().unwrap().to_ascii_lowercase();
        assert!(!head.contains("\r\nauthorization:"), "{variable}: {head}");
        // base64 of `user:p@ss`
        let has_password =
            format!("{head}\r\n").contains("\r\nproxy-authorization: basic dxnlcjpwqhnz\r\n");
        assert_eq!(has_password, !user.is_empty(), "{variable}: {head}");
        for hidden in [KEY, "/v1/responses"] {
            assert!(
                !all.contains(hidden),
                "{variable}: {hidden} is not encrypted"
            );
        }
        assert_eq!(upstream.connections(), 1, "{variable}");
        let head = upstream.requests().remove(0).head;
        assert_eq!(head.all("authorization"), [format!("Bearer {KEY}")]);
        assert_eq!(head.get("proxy-authorization"), None);
        let log = proxy.stop().stderr.join("\n");
        assert!(!log.contains("p%40ss") && !log.contains("p@ss"), "{log}");
    }
}

#[test]
fn websocket_goes_through_the_proxy_encrypted() {
    let upstream = Upstream::start(echo_tunnel);
    let tunnels = Tunnels::start(ESTABLISHED);
    let command = ProxyCommand::for_upstream(&upstream).env("HTTPS_PROXY", &tunnels.url);
    let proxy = command.arg("--websocket").start();
    let mut client = open_tunnel(&proxy, "");
    client.send("a secret message").unwrap();
    assert_eq!(client.read_bytes(16).unwrap(), b"a secret message");
    client.shutdown_write();
    assert_eq!(client.read_until_closed().unwrap(), b"");
    let received = tunnels.received();
    let [all] = received.as_slice() else {
        panic!("expected one tunnel: {received:#?}");
    };
    assert!(all.starts_with("CONNECT localhost:"), "{all}");
    for hidden in [KEY, "/v1/responses", "websocket", "secret"] {
        assert!(!all.contains(hidden), "{hidden} is not encrypted: {all}");
    }
}

#[test]
fn variables_select_proxy_or_direct_connection() {
    const PLAIN: &str = "localhost, without TLS";
    // With RIGHT, the connection goes through that proxy, else directly; never through WRONG. The unit tests of
    // `upstream` have more cases.
    for (host, variables) in [
        ("localhost", "HTTPS_PROXY=RIGHT;ALL_PROXY=WRONG"),
        ("localhost", "ALL_PROXY=RIGHT;HTTP_PROXY=WRONG"),
        ("localhost", "ALL_PROXY=WRONG;NO_PROXY=x.org, localhost ,y"),
        ("localhost", "HTTPS_PROXY=RIGHT;NO_PROXY=host"),
        ("localhost", "HTTPS_PROXY=RIGHT;NO_PROXY="),
        ("127.0.0.1", "ALL_PROXY=WRONG;NO_PROXY=127.0.0.1"),
        ("127.0.0.1", "ALL_PROXY=WRONG;NO_PROXY=127.0.0.0/8"),
        ("127.0.0.1", "ALL_PROXY=RIGHT;NO_PROXY=10.0.0.0/8"),
        // Unencrypted requests never go through a proxy.
        (PLAIN, "HTTP_PROXY=WRONG;HTTPS_PROXY=WRONG"),
        (PLAIN, "ALL_PROXY=WRONG"),
    ] {
        let upstream = match host {
            PLAIN => Upstream::start_plain(ok),
            _ => Upstream::start(ok),
        };
        let [right, wrong] = [ESTABLISHED; 2].map(Tunnels::start);
        let name = host.split(',').next().unwrap();
        let url = upstream.url().replace("localhost", name);
        let mut command = ProxyCommand::new().url(&url).trust(&upstream);
        for variable in variables.split(';') {
            let (name, value) = variable.split_once('=').unwrap();
            let value = value.replace("RIGHT", &right.url);
            command = command.env(name, value.replace("WRONG", &wrong.url));
        }
        assert_eq!(
            command.start().post_default().status(),
            200,
            "{host} {variables}"
        );
        let tunnels = (right.received().len(), wrong.received().len());
        let expected = usize::from(variables.contains("RIGHT"));
        assert_eq!(tunnels, (expected, 0), "{host} {variables}");
    }
}

#[test]
fn any_2xx_response_to_connect_opens_the_tunnel() {
    for response in [
        "HTTP/1.0 200 Connection established\r\n\r\n",
        "HTTP/1.1 201 Created\r\n\r\n",
        "HTTP/1.1 204 No Content\r\nProxy-Agent: x\r\n\r\n",
        // These framing fields must be ignored (RFC 9112, section 6.3).
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        "HTTP/1.1 299 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n",
    ] {
        let upstream = Upstream::start(ok);
        let url = Tunnels::start(response).url;
        let proxy = ProxyCommand::for_upstream(&upstream)
            .env("HTTPS_PROXY", url)
            .start();
        assert_eq!(proxy.post_default().status(), 200, "{response:?}");
    }
}

#[test]
fn failed_tunnel_returns_502_naming_the_proxy() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr();
    let closed = format!("http://{}", closed.unwrap());
    let responses = [
        "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
        "HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\nno way",
        "HTTP/1.1 503 Service Unavailable\r\n\r\n",
        "what is this\r\n\r\n",
        "",
    ];
    let proxies = responses.map(|response| (response, Tunnels::start(response).url));
    for (name, url) in proxies.into_iter().chain([("closed port", closed)]) {
        let upstream = Upstream::start(ok);
        let mut proxy = ProxyCommand::for_upstream(&upstream)
            .env("HTTPS_PROXY", url)
            .start();
        let response = proxy.post_default();
        assert_eq!(response.status(), 502, "{name:?}");
        let line = proxy.wait_for_request("request ", &["status=502", "(proxy)"]);
        // The log names the status of the proxy's response.
        let status = name
            .strip_prefix("HTTP/1.1 ")
            .and_then(|rest| rest.get(..3));
        assert!(
            line.contains(status.unwrap_or_default()),
            "{name:?}: {line}"
        );
        let message = response.error_message();
        assert!(!message.contains(KEY), "{name:?}: {message}");
        assert!(message.contains("proxy"), "{name:?}: {message}");
        let direct = upstream.connections();
        assert_eq!(direct, 0, "{name:?}: a connection bypassed the proxy");
    }
}
