//! Command lines for OpenAI's `codex responses-api-proxy` behave the same here, and Codex CLI works through the proxy
//! without a key.

mod support;

use serde_json::{Value, json};
use std::sync::mpsc::Sender;
use std::{env, fs, io, net::TcpStream, process::Command};
use support::*;
use tungstenite::{Message, WebSocket, protocol::Role};

#[test]
fn listens_on_the_given_port_on_127_0_0_1_only() {
    let port = unused_port();
    let proxy = ProxyCommand::new()
        .args(["--port", &port.to_string()])
        .start();
    let line = proxy.log.last().unwrap();
    assert_eq!(line, &format!("listening on http://127.0.0.1:{port}"));
    // Other systems have only the address 127.0.0.1 by default.
    let others = ["::1", "127.0.0.2"].into_iter();
    for address in others.take(if cfg!(target_os = "linux") { 2 } else { 1 }) {
        TcpStream::connect((address, port)).expect_err(address);
    }
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok());
}

#[test]
fn help_and_version_need_no_key() {
    for (flag, words) in [
        ("--help", "--port --server-info --http-shutdown"),
        ("-h", "--upstream-url --upstream-ca --allow-user"),
        ("--version", env!("CARGO_PKG_VERSION")),
        ("-V", env!("CARGO_PKG_VERSION")),
    ] {
        // Stdin is open and silent, like a terminal.
        let help = ProxyCommand::new().open_stdin().arg(flag).spawn();
        let run = help.wait();
        assert_eq!(run.status.code(), Some(0), "{flag}: {run:?}");
        assert_eq!(run.stderr, [""; 0], "{flag}");
        for word in words.split(' ').chain(["codex-responses-api-proxy"]) {
            assert!(run.stdout.contains(word), "{flag}: {word}: {run:?}");
        }
    }
}

/// Requests that codex-cli 0.169.0 rejects with 403 (`/shutdown` unless it is enabled).
const REJECTED: &str = "POST /v1/responses?|POST /v1/responses?a=b|POST /v1/responses/|POST /v1/responses/compact|\
    POST /v1//responses|POST /v1/Responses|POST /|GET /v1/responses|PUT /v1/responses|DELETE /v1/responses|\
    GET /v1/models|POST /v1/chat/completions|POST /shutdown|GET /shutdown";

/// Creates command lines of one of the two programs.
type Program<'a> = &'a dyn Fn() -> ProxyCommand;

/// Runs a check with this program and with OpenAI's, whose behaviour was recorded from codex-cli 0.169.0.
fn compare(check: fn(Program<'_>)) {
    check(&ProxyCommand::new);
    let Some(codex) = find_codex() else {
        let why = "no `codex` on PATH or in CODEX: compared with recorded behaviour";
        return skip("running OpenAI's proxy", why);
    };
    let home = TestDir::new();
    check(&|| {
        let command = ProxyCommand::from_command(Command::new(&codex));
        let command = command.arg("responses-api-proxy");
        command.env("CODEX_HOME", &*home)
    });
}

#[test]
fn both_accept_the_same_keys_and_shut_down_over_http() {
    compare(|program| {
        let upstream = Upstream::start_plain(ok);
        for (key, end) in [
            ("sk-a", ""),
            ("sk-b", "\n"),
            ("sk-c", "\r\n"),
            ("k_Z-09", "\n"),
        ] {
            let command = program().url(&upstream.url());
            let command = command.stdin_bytes(format!("{key}{end}"));
            let dir = TestDir::new();
            let command = command.arg("--server-info").arg(dir.join("info"));
            let proxy = command.arg("--http-shutdown").start();
            let mut client = proxy.client();
            let response = client.post("Authorization: Bearer theirs\r\n", "{}");
            assert_eq!(response.unwrap().status(), 200, "{key}");
            let head = upstream.requests().pop().unwrap().head;
            assert_eq!(head.all("authorization"), [format!("Bearer {key}")]);
            let status = proxy.client().status_of("GET /shutdown").unwrap();
            let code = proxy.wait().status.code();
            assert_eq!((status, code), (200, Some(0)), "{key}");
        }
    });
}

#[test]
fn both_reject_the_same_requests() {
    compare(|program| {
        let upstream = Upstream::start_plain(ok);
        let proxy = program().url(&upstream.url()).stdin_bytes("sk-a").start();
        let rejected = REJECTED.split('|').map(|line| (line, 403));
        for (line, expected) in rejected.chain([("POST /v1/responses", 200)]) {
            let mut client = proxy.client();
            let head = format!("{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
            client.send(head).unwrap();
            let status = client.read_response().unwrap().status();
            assert_eq!(status, expected, "{line}");
        }
    });
}

#[test]
fn both_write_the_same_info_file() {
    compare(|program| {
        let upstream = Upstream::start_plain(ok);
        let dir = TestDir::new();
        let file = dir.join("info/server.json");
        let command = |command: ProxyCommand| {
            let command = command.url(&upstream.url()).stdin_bytes("sk-a");
            command.arg("--server-info").arg(&file)
        };
        let proxy = command(program()).start();
        let info = fs::read_to_string(&file).unwrap();
        let json: Value = serde_json::from_str(&info).unwrap();
        let (port, pid) = (proxy.port, json["pid"].as_u64().unwrap());
        assert_eq!(info, format!("{{\"port\":{port},\"pid\":{pid}}}\n"));
        drop(proxy);

        // codex-action's `unprivileged-user` strategy.
        let _read_only = ReadOnly::new(file.parent().unwrap());
        write_shared(&file, "");
        if let Some(unprivileged) = unprivileged("an info file in a read-only directory", program) {
            let proxy = command(unprivileged).start();
            let info = fs::read_to_string(&file).unwrap();
            let port = format!("\"port\":{},", proxy.port);
            assert!(info.contains(&port), "{info}");
        }
    });
}

#[test]
fn both_honour_the_same_environment_variables() {
    compare(|program| {
        let (plain, tls) = (Upstream::start_plain(ok), Upstream::start(ok));
        let ca = tls.ca_file().unwrap();
        for (upstream, name, value) in [
            (&tls, "SSL_CERT_FILE", ca.as_os_str()),
            (&plain, "all_proxy", "socks5://127.0.0.1:9".as_ref()),
        ] {
            let command = program().url(&upstream.url()).env(name, value);
            let command = command.env("NO_PROXY", "localhost");
            let status = command.start().post_default().status();
            assert_eq!(status, 200, "{name}");
        }
    });
}

#[test]
fn both_exit_with_the_same_statuses() {
    compare(|program| {
        let long = "k".repeat(2000);
        for (input, args, expected) in [
            ("", "", 1),
            ("\n", "", 1),
            ("sk a\n", "", 1),
            ("sk.a\n", "", 1),
            (&long, "", 1),
            ("sk-a", "--no-such-flag", 2),
            ("sk-a", "--port x", 2),
            ("sk-a", "--port 65536", 2),
            ("sk-a", "--upstream-url /no", 1),
            ("sk-a", "--help", 0),
        ] {
            let command = program().stdin_bytes(input);
            let code = command.args(args.split_whitespace()).run().status.code();
            assert_eq!(code, Some(expected), "{input:?} {args}");
        }
    });
}

const WORDS: [&str; 6] = ["The ", "key ", "stays ", "with ", "the ", "proxy."];
const QUESTION: &str = "Where does the key stay?";

/// Runs Codex with the proxy as its provider, with these additional settings. Returns its output.
fn run_codex(codex: &str, proxy: &Proxy, settings: &str) -> String {
    let home = TestDir::new();
    let mut command = Command::new(codex);
    command.env_clear();
    let url = format!("http://127.0.0.1:{}/v1", proxy.port);
    let wire_api = "wire_api = 'responses'";
    let provider = format!("{{ name = 'proxy', base_url = '{url}', {wire_api}{settings} }}");
    let command = ProxyCommand::from_command(command).env("PATH", env::var_os("PATH").unwrap());
    let command = command.env("HOME", &*home).env("CODEX_HOME", &*home);
    let command = command.args(["exec", "--skip-git-repo-check", QUESTION]);
    let command = command.args(["-c", "model_provider=\"proxy\"", "-c"]);
    let command = command.arg(format!("model_providers.proxy={provider}"));
    let run = command.current_dir(&home).stdin_bytes("").run();
    assert!(run.status.success(), "{run:#?}");
    run.stdout.trim().to_owned()
}

/// The output of Codex with these settings. Without Codex, the text of the response to its recorded request.
fn run_or_replay(proxy: &Proxy, settings: &str, replay: fn(&Proxy) -> String) -> String {
    let Some(codex) = find_codex() else {
        let why = "no `codex` on PATH or in CODEX: a recorded request is replayed";
        skip("running Codex through the proxy", why);
        return replay(proxy);
    };
    run_codex(&codex, proxy, settings)
}

/// Sends the relevant parts of a request of codex-cli 0.169.0. Returns the words of the response.
fn replay_post(proxy: &Proxy) -> String {
    let mut client = proxy.client();
    let message = json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": QUESTION }] });
    let body = json!({ "model": "any", "input": [message], "stream": true, "store": false });
    let types = "Accept: text/event-stream\r\nContent-Type: application/json\r\n";
    let headers = format!("{types}Originator: codex_exec\r\n");
    let response = client.post(&headers, body.to_string()).unwrap();
    let body = String::from_utf8(response.body).unwrap();
    let lines = body.lines();
    let data = lines.filter_map(|line| line.strip_prefix("data: ")?.parse::<Value>().ok());
    let delta = |event: Value| event["delta"].as_str().unwrap_or_default().to_owned();
    data.map(delta).collect()
}

#[test]
fn codex_without_a_key_streams_through_the_proxy() {
    let (upstream, mut proxy) = serve(|request| {
        request.read_body()?;
        request.respond_with_events(&events(&WORDS))
    });
    let printed = run_or_replay(&proxy, "", replay_post);
    assert_eq!(printed, WORDS.concat());
    proxy.wait_for_request("request ", &[" status=200 "]);
    let log = proxy.stop().stderr;
    let refused = log.iter().any(|line| line.starts_with("refused "));
    assert!(!refused, "{log:#?}");
    let recorded = upstream.into_requests();
    assert!(!recorded.is_empty());
    for recorded in recorded {
        assert_eq!(recorded.head.start, "POST /v1/responses HTTP/1.1");
        assert_eq!(
            recorded.head.all("authorization"),
            [format!("Bearer {KEY}")]
        );
        let body: Value = serde_json::from_slice(&recorded.body).unwrap();
        assert_eq!(body["stream"], true);
        assert!(body.to_string().contains(QUESTION), "{body}");
    }
}

/// Serves the Responses API over a WebSocket, and sends the requests to the test.
fn serve_websocket(request: &mut UpstreamRequest<'_>, forward: &Sender<Value>) -> io::Result<()> {
    let mut socket = request.websocket()?;
    while let Some((request, events)) = next_request(&mut socket, &WORDS) {
        for event in events {
            socket.send(event).map_err(io::Error::other)?;
        }
        forward.send(request).unwrap();
    }
    Ok(())
}

/// Replays the handshake and the relevant parts of the requests of codex-cli 0.169.0. Returns the words of the response.
fn replay_websocket(proxy: &Proxy) -> String {
    let client = open_tunnel(proxy, CODEX_HEADERS);
    let stream = client.socket().try_clone().unwrap();
    let mut socket = WebSocket::from_raw_socket(stream, Role::Client, None);
    let message = json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": QUESTION }] });
    let mut words = String::new();
    for request in [
        json!({ "type": "response.create", "stream": true, "input": [], "generate": false }),
        json!({ "type": "response.create", "stream": true, "input": [message] }),
    ] {
        socket.send(Message::text(request.to_string())).unwrap();
        let mut kind = Value::Null;
        while kind != "response.completed" {
            let text = socket.read().unwrap().into_text().unwrap();
            let mut event: Value = text.parse().unwrap();
            words += event["delta"].as_str().unwrap_or_default();
            kind = event["type"].take();
        }
    }
    words
}

#[test]
fn codex_streams_over_a_websocket_through_the_proxy() {
    let (forward, requests) = channel();
    let upstream = Upstream::start(move |request| serve_websocket(request, &forward));
    let mut proxy = start_with_websocket(&upstream);
    let printed = run_or_replay(&proxy, ", supports_websockets = true", replay_websocket);
    assert_eq!(printed, WORDS.concat());
    let [first, second] = [(); 2].map(|()| requests.recv().unwrap());
    assert_eq!(first["generate"], false);
    assert!(second.to_string().contains(QUESTION), "{second}");
    let line = proxy.wait_for_request("request ", &[" status=101 "]);
    assert!(!line.contains("error="), "{line}");
    let log = proxy.stop().stderr;
    let refused = log.iter().any(|line| line.starts_with("refused "));
    assert!(!refused, "{log:#?}");
    let [recorded] = upstream.into_requests().try_into().expect("one handshake");
    assert_eq!(recorded.head.start, "GET /v1/responses HTTP/1.1");
    assert_eq!(
        recorded.head.all("authorization"),
        [format!("Bearer {KEY}")]
    );
    let beta = recorded.head.get("openai-beta").unwrap_or_default();
    assert!(beta.starts_with("responses_websockets="), "{beta}");
}

#[test]
fn codex_falls_back_to_post_if_bodies_are_dumped() {
    let Some(codex) = find_codex() else {
        let why = "no `codex` on PATH or in CODEX";
        return skip("running Codex with --websocket and --dump-dir", why);
    };
    let upstream = Upstream::start(|request| {
        request.read_body()?;
        request.respond_with_events(&events(&WORDS))
    });
    let dir = TestDir::new();
    let command = ProxyCommand::for_upstream(&upstream).args(["--websocket", "--dump-dir"]);
    let mut proxy = command.arg(dir.join("dumps")).start();
    let printed = run_codex(&codex, &proxy, ", supports_websockets = true");
    assert_eq!(printed, WORDS.concat());
    // After one rejected handshake, Codex sends no other.
    proxy.wait_for_request("refused ", &[" status=426 "]);
    proxy.wait_for_request("request ", &[" status=200 "]);
}
