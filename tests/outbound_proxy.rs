//! `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` decide how the upstream is reached; a proxy on the way never sees the key.

mod support;

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};
use support::{
    PATIENCE,
    client::Client,
    proxy::{KEY, Launch},
    upstream::{Upstream, ok},
};

/// A proxy that makes tunnels, or says why not.
struct Tunnels {
    port: u16,
    /// What came over each connection from the program, all of it.
    came: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Tunnels {
    fn start(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let came = Arc::new(Mutex::new(Vec::new()));
        let record = came.clone();
        thread::spawn(move || {
            for (number, client) in listener.incoming().enumerate() {
                record.lock().unwrap().push(Vec::new());
                let record = record.clone();
                thread::spawn(move || Self::serve(client?, answer, &record, number));
            }
        });
        Self { port, came }
    }

    fn serve(
        client: TcpStream,
        answer: &str,
        record: &Mutex<Vec<Vec<u8>>>,
        number: usize,
    ) -> io::Result<()> {
        client.set_read_timeout(Some(PATIENCE))?;
        let mut from_client = &client;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            from_client.read_exact(&mut byte)?;
            head.extend_from_slice(&byte);
        }
        record.lock().unwrap()[number].extend_from_slice(&head);
        // In two pieces, as a slow proxy's may come.
        let (first, second) = answer.split_at(answer.len() / 2);
        (&client).write_all(first.as_bytes())?;
        (&client).write_all(second.as_bytes())?;
        if !answer.starts_with("HTTP/1.1 200") {
            return Ok(());
        }
        let head = String::from_utf8(head).unwrap();
        let target = head.split(' ').nth(1).unwrap();
        let server = TcpStream::connect(target)?;
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ = io::copy(&mut &server, &mut &client);
                let _ = client.shutdown(Shutdown::Write);
            });
            let mut piece = [0; 65536];
            while let Ok(got @ 1..) = from_client.read(&mut piece) {
                record.lock().unwrap()[number].extend_from_slice(&piece[..got]);
                (&server).write_all(&piece[..got])?;
            }
            server.shutdown(Shutdown::Write)
        })
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The heads that came, as text.
    fn heads(&self) -> Vec<String> {
        let came = self.came.lock().unwrap();
        let head = |bytes: &Vec<u8>| {
            let end = support::http::find(bytes, b"\r\n\r\n").map_or(bytes.len(), |at| at + 4);
            String::from_utf8_lossy(&bytes[..end]).into_owned()
        };
        came.iter().map(head).collect()
    }
}

const ESTABLISHED: &str = "HTTP/1.1 200 Connection established\r\nVia: tunnels\r\n\r\n";

#[test]
fn the_upstream_is_reached_through_the_proxy_that_the_environment_names() {
    for variable in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
        let upstream = Upstream::start(ok);
        let tunnels = Tunnels::start(ESTABLISHED);
        let proxy = Launch::to(&upstream).env(variable, tunnels.url()).start();
        let mut client = Client::connect(proxy.port);
        for _ in 0..3 {
            assert_eq!(client.ask().unwrap().status(), 200, "{variable}");
        }
        let heads = tunnels.heads();
        let [head] = heads.as_slice() else {
            panic!("{variable}: not one tunnel but {heads:#?}");
        };
        let target = format!("localhost:{}", upstream.port);
        assert!(
            head.starts_with(&format!("CONNECT {target} HTTP/1.1\r\n")),
            "{variable}: {head}"
        );
        assert!(
            !head.to_ascii_lowercase().contains("\r\nauthorization:"),
            "{variable}: {head}"
        );
        let all = tunnels.came.lock().unwrap().concat();
        let all = String::from_utf8_lossy(&all);
        assert!(
            !all.contains(KEY) && !all.contains("/v1/responses"),
            "{variable}: TLS is end to end"
        );
        assert_eq!(upstream.connections(), 1, "{variable}");
        assert_eq!(
            upstream.seen()[0].head.get("authorization"),
            Some(&*format!("Bearer {KEY}")),
            "{variable}"
        );
    }
}

#[test]
fn https_proxy_goes_before_all_proxy_and_http_proxy_is_not_meant() {
    let upstream = Upstream::start(ok);
    let (right, wrong) = (Tunnels::start(ESTABLISHED), Tunnels::start(ESTABLISHED));
    let launch = Launch::to(&upstream).env("HTTPS_PROXY", right.url());
    let proxy = launch
        .env("ALL_PROXY", wrong.url())
        .env("HTTP_PROXY", wrong.url())
        .start();
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    assert_eq!((right.heads().len(), wrong.heads().len()), (1, 0));

    let proxy = Launch::to(&upstream).env("HTTP_PROXY", wrong.url()).start();
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    assert_eq!(wrong.heads().len(), 0, "HTTP_PROXY alone");
}

#[test]
fn the_proxys_own_credentials_go_to_it_and_no_further() {
    let upstream = Upstream::start(ok);
    let tunnels = Tunnels::start(ESTABLISHED);
    let url = tunnels.url().replace("http://", "http://user:p%40ss@");
    let proxy = Launch::to(&upstream).env("HTTPS_PROXY", url).start();
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    // base64 of `user:p@ss`
    let expected = "\r\nproxy-authorization: basic dxnlcjpwqhnz\r\n";
    let head = tunnels.heads().remove(0).to_ascii_lowercase();
    assert!(head.contains(expected), "{head}");
    let raw = upstream.only().head.raw.to_ascii_lowercase();
    assert!(support::http::find(&raw, b"proxy-authorization").is_none());
    let log = proxy.stop().stderr.join("\n");
    assert!(!log.contains("p%40ss") && !log.contains("p@ss"), "{log}");
}

#[test]
fn no_proxy_names_what_is_reached_directly() {
    let cases = [
        ("the name", "NO_PROXY", "localhost", true),
        (
            "the name among others",
            "NO_PROXY",
            "example.org, localhost ,10.0.0.0/8",
            true,
        ),
        ("in lower case", "no_proxy", "localhost", true),
        ("everything", "NO_PROXY", "*", true),
        ("another name", "NO_PROXY", "example.org", false),
        ("a part of the name", "NO_PROXY", "host", false),
        ("nothing", "NO_PROXY", "", false),
    ];
    for (name, variable, value, direct) in cases {
        let upstream = Upstream::start(ok);
        let tunnels = Tunnels::start(ESTABLISHED);
        let launch = Launch::to(&upstream).env("HTTPS_PROXY", tunnels.url());
        let proxy = launch.env(variable, value).start();
        assert_eq!(
            Client::connect(proxy.port).ask().unwrap().status(),
            200,
            "{name}"
        );
        assert_eq!(tunnels.heads().is_empty(), direct, "{name}");
    }
}

#[test]
fn no_proxy_knows_addresses_and_networks() {
    for (value, direct) in [
        ("127.0.0.1", true),
        ("127.0.0.0/8", true),
        ("10.0.0.0/8", false),
    ] {
        let upstream = Upstream::start(ok);
        let tunnels = Tunnels::start(ESTABLISHED);
        let url = upstream.url().replace("localhost", "127.0.0.1");
        let launch = Launch::new().args(["--upstream-url", &url]);
        let launch = launch
            .arg("--upstream-ca")
            .arg(upstream.authority().unwrap());
        let proxy = launch
            .env("ALL_PROXY", tunnels.url())
            .env("NO_PROXY", value)
            .start();
        assert_eq!(
            Client::connect(proxy.port).ask().unwrap().status(),
            200,
            "{value}"
        );
        assert_eq!(tunnels.heads().is_empty(), direct, "{value}");
    }
}

#[test]
fn an_upstream_without_tls_is_never_reached_through_a_proxy() {
    let upstream = Upstream::plain(ok);
    let tunnels = Tunnels::start(ESTABLISHED);
    let launch = Launch::to(&upstream);
    let proxy = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"]
        .into_iter()
        .fold(launch, |launch, variable| {
            launch.env(variable, tunnels.url())
        })
        .start();
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    assert!(tunnels.heads().is_empty());
}

#[test]
fn a_proxy_that_makes_no_tunnel_is_a_502_that_says_so() {
    let answers = [
        "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
        "HTTP/1.1 403 Forbidden\r\nContent-Length: 6\r\n\r\nno way",
        "HTTP/1.1 503 Service Unavailable\r\n\r\n",
        "what is this\r\n\r\n",
        "",
    ];
    for answer in answers {
        let upstream = Upstream::start(ok);
        let tunnels = Tunnels::start(answer);
        let proxy = Launch::to(&upstream)
            .env("HTTPS_PROXY", tunnels.url())
            .start();
        let mut client = Client::connect(proxy.port);
        let response = client.ask().unwrap();
        assert_eq!(response.status(), 502, "{answer:?}");
        let message = response.error_message();
        assert!(
            message.contains("proxy") && !message.contains(KEY),
            "{answer:?}: {message}"
        );
        assert_eq!(
            upstream.connections(),
            0,
            "{answer:?}: nothing goes around the proxy"
        );
    }
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream)
        .env("HTTPS_PROXY", format!("http://{nobody}"))
        .start();
    let response = Client::connect(proxy.port).ask().unwrap();
    assert_eq!(response.status(), 502, "no proxy there");
    response.error_message();
    assert_eq!(upstream.connections(), 0);
}
