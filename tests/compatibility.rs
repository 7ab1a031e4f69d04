//! Every command line written for OpenAI's `codex responses-api-proxy` works here with the same outcome, and the main
//! job is done: Codex CLI, with no key anywhere near it, prints an answer that it streamed through the proxy.

mod support;

use nix::unistd::geteuid;
use serde_json::{Value, json};
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::mpsc::Sender;
use std::{env, fs, io, net::TcpStream, path::Path, process::Command};
use support::*;
use tungstenite::{Message, WebSocket, protocol::Role};

fn with_info_file(file: &Path) -> Proxy {
    ProxyCommand::new().arg("--server-info").arg(file).start()
}

fn assert_info(file: &Path, proxy: &Proxy) {
    let expected = format!("{{\"port\":{},\"pid\":{}}}\n", proxy.port, proxy.pid());
    assert_eq!(fs::read_to_string(file).unwrap(), expected);
}

#[test]
fn the_info_file_is_one_line_of_json_and_goes_with_a_clean_exit_if_it_is_still_ours() {
    let dir = TestDir::new();
    let file = dir.join("made/on/the/way/info.json");
    let others = "{\"port\":1,\"pid\":1}\n";
    let is_emptied = cfg!(target_os = "linux") && geteuid().is_root();
    for is_ours in [true, false] {
        let proxy = with_info_file(&file);
        assert_info(&file, &proxy);
        let beside = fs::read_dir(file.parent().unwrap()).unwrap().count();
        assert_eq!(beside, 1, "what it was written to before is gone");
        if !is_ours {
            fs::remove_file(&file).unwrap();
            fs::write(&file, others).unwrap();
        }
        assert_eq!(proxy.stop().status.code(), Some(0));
        let left = fs::read_to_string(&file).ok();
        // Started as root, it has dropped root since, and the directory is root's.
        let emptied = (is_ours && is_emptied).then_some("");
        assert_eq!(left.as_deref(), emptied.or((!is_ours).then_some(others)));
    }
}

#[test]
fn a_link_or_an_earlier_file_where_the_info_file_goes_is_replaced_and_not_followed() {
    let dir = TestDir::new();
    let (file, precious) = (dir.join("info.json"), dir.join("precious"));
    fs::write(&precious, "untouched").unwrap();
    symlink(&precious, &file).unwrap();
    let proxy = with_info_file(&file);
    assert!(!fs::symlink_metadata(&file).unwrap().is_symlink());
    assert_info(&file, &proxy);
    drop(proxy);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "untouched");

    fs::write(&file, "{\"port\":1,\"pid\":1}\nand more\n".repeat(100)).unwrap();
    assert_info(&file, &with_info_file(&file));
}

/// Makes a directory read-only for a user without privileges, until the end of the test.
struct ReadOnly<'a>(&'a Path);

impl<'a> ReadOnly<'a> {
    fn new(dir: &'a Path) -> Self {
        fs::set_permissions(dir, Permissions::from_mode(0o555)).unwrap();
        Self(dir)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let _ = fs::set_permissions(self.0, Permissions::from_mode(0o755));
    }
}

/// A file that everyone may write, as codex-action creates it for its `unprivileged-user` strategy.
fn write_shared(file: &Path, content: &str) {
    fs::write(file, content).unwrap();
    fs::set_permissions(file, Permissions::from_mode(0o666)).unwrap();
}

#[test]
fn info_file_in_read_only_directory_is_written_in_place() {
    let what = "an info file in a read-only directory";
    for before in ["", &"{\"port\":1,\"pid\":1}\n".repeat(100)] {
        let dir = TestDir::new();
        let file = dir.join("info.json");
        write_shared(&file, before);
        let inode = fs::metadata(&file).unwrap().ino();
        let _read_only = ReadOnly::new(&dir);
        let Some(command) = unprivileged(what, ProxyCommand::new) else {
            return;
        };
        let proxy = command.arg("--server-info").arg(&file).start();
        assert_info(&file, &proxy);
        assert_eq!(fs::metadata(&file).unwrap().ino(), inode);
        // As the action does once the file is there.
        fs::set_permissions(&file, Permissions::from_mode(0o444)).unwrap();
        assert_eq!(proxy.stop().status.code(), Some(0));
        assert_eq!(fs::read_to_string(&file).unwrap(), "", "it is emptied");
        assert_eq!(fs::read_dir(&*dir).unwrap().count(), 1);
    }
}

#[test]
fn info_file_that_others_rewrote_in_place_is_left_alone() {
    let dir = TestDir::new();
    let file = dir.join("info.json");
    let proxy = with_info_file(&file);
    let theirs = format!("{} ", fs::read_to_string(&file).unwrap());
    fs::write(&file, &theirs).unwrap();
    assert_eq!(proxy.stop().status.code(), Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), theirs);
}

#[test]
fn links_in_read_only_directory_are_not_written_through() {
    let dir = TestDir::new();
    let victim = dir.join("victim");
    let outside = TestDir::new();
    let linked = outside.join("linked");
    for file in [&victim, &linked] {
        write_shared(file, "untouched");
    }
    symlink(&victim, dir.join("symbolic")).unwrap();
    if fs::hard_link(&linked, dir.join("hard")).is_err() {
        skip("a hard link", "another file system");
    }
    let _read_only = ReadOnly::new(&dir);
    for name in ["symbolic", "hard", "missing"] {
        let path = dir.join(name);
        let Some(command) = unprivileged("links", ProxyCommand::without_key) else {
            return;
        };
        let command = command.arg("--server-info").arg(&path);
        command.assert_startup_error(name, 1, &[path.to_str().unwrap()]);
    }
    for file in [&victim, &linked] {
        assert_eq!(fs::read_to_string(file).unwrap(), "untouched");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn info_file_mounted_into_a_container_is_written_in_place() {
    let dir = TestDir::new();
    let (source, file) = (dir.join("source"), dir.join("info.json"));
    write_shared(&source, "");
    write_shared(&file, "");
    let command = ProxyCommand::new().arg("--server-info").arg(&file);
    let mounts = vec![Mount::File(source.clone(), file)];
    if let Some(proxy) = start_with_mounts("a mounted info file", command, mounts) {
        assert_info(&source, &proxy);
        assert_eq!(proxy.stop().status.code(), Some(0));
        assert_eq!(fs::read_to_string(&source).unwrap(), "");
        assert_eq!(fs::read_dir(&*dir).unwrap().count(), 2);
    }
}

#[test]
fn it_listens_on_the_port_that_it_is_given_and_on_loopback_only() {
    let port = unused_port();
    let proxy = ProxyCommand::new()
        .args(["--port", &port.to_string()])
        .start();
    let line = proxy.log.last().unwrap();
    assert_eq!(line, &format!("listening on http://127.0.0.1:{port}"));
    // Elsewhere, the kernel has no answer at such an address.
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
        // Whoever asks for help at a prompt types nothing: stdin stays open.
        let help = ProxyCommand::new().open_stdin().arg(flag).spawn();
        let run = help.wait();
        assert_eq!(run.status.code(), Some(0), "{flag}: {run:?}");
        assert_eq!(run.stderr, [""; 0], "{flag}");
        for word in words.split(' ').chain(["codex-responses-api-proxy"]) {
            assert!(run.stdout.contains(word), "{flag}: {word}: {run:?}");
        }
    }
}

/// What codex-cli 0.169.0 refuses with 403 (`/shutdown` unless it is enabled).
const REFUSED: &str = "POST /v1/responses?|POST /v1/responses?a=b|POST /v1/responses/|POST /v1/responses/compact|\
    POST /v1//responses|POST /v1/Responses|POST /|GET /v1/responses|PUT /v1/responses|DELETE /v1/responses|\
    GET /v1/models|POST /v1/chat/completions|POST /shutdown|GET /shutdown";

/// The program does what codex-cli 0.169.0 did.
fn assert_does_the_same(program: impl Fn() -> ProxyCommand) {
    let upstream = Upstream::start_plain(ok);
    let dir = TestDir::new();
    let file = dir.join("info/server.json");
    let command = |input: &str| {
        let command = program().url(&upstream.url()).stdin_bytes(input);
        command.arg("--server-info").arg(&file)
    };
    for (key, end) in [
        ("sk-a", ""),
        ("sk-b", "\n"),
        ("sk-c", "\r\n"),
        ("k_Z-09", "\n"),
    ] {
        let command = command(&format!("{key}{end}"));
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

    let proxy = command("sk-requests").start();
    let refused = REFUSED.split('|').map(|line| (line, 403));
    for (line, expected) in refused.chain([("POST /v1/responses", 200)]) {
        let mut client = proxy.client();
        let head = format!("{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n");
        client.send(head).unwrap();
        assert_eq!(client.read_response().unwrap().status(), expected, "{line}");
    }
    let info = fs::read_to_string(&file).unwrap();
    let json: Value = serde_json::from_str(&info).unwrap();
    let (port, pid) = (proxy.port, json["pid"].as_u64().unwrap());
    assert_eq!(info, format!("{{\"port\":{port},\"pid\":{pid}}}\n"));
    drop(proxy);

    // codex-action's `unprivileged-user` strategy.
    let _read_only = ReadOnly::new(file.parent().unwrap());
    write_shared(&file, "");
    if let Some(command) = unprivileged("an info file in a read-only directory", &program) {
        let command = command.url(&upstream.url()).stdin_bytes("sk-a");
        let proxy = command.arg("--server-info").arg(&file).start();
        let info = fs::read_to_string(&file).unwrap();
        assert!(
            info.contains(&format!("\"port\":{},", proxy.port)),
            "{info}"
        );
    }

    let tls = Upstream::start(ok);
    let ca = tls.ca_file().unwrap();
    let socks = ("all_proxy", "socks5://127.0.0.1:9".as_ref());
    for (name, value) in [("SSL_CERT_FILE", ca.as_os_str()), socks] {
        let upstream = if name == socks.0 { &upstream } else { &tls };
        let command = program().url(&upstream.url()).env(name, value);
        let command = command.env("NO_PROXY", "localhost");
        assert_eq!(command.start().post_default().status(), 200, "{name}");
    }

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
        let command = program().stdin_bytes(input).args(args.split_whitespace());
        let code = command.run().status.code();
        assert_eq!(code, Some(expected), "{input:?} {args}");
    }
}

#[test]
fn openais_own_does_the_same() {
    assert_does_the_same(ProxyCommand::new);
    let Some(codex) = find_codex() else {
        let why = "no `codex` on PATH, nor named by CODEX: compared with what was recorded";
        return skip("running OpenAI's own", why);
    };
    let home = TestDir::new();
    assert_does_the_same(|| {
        let command = ProxyCommand::from_command(Command::new(&codex)).arg("responses-api-proxy");
        command.env("CODEX_HOME", &*home)
    });
}

const WORDS: [&str; 6] = ["The ", "key ", "stays ", "with ", "the ", "proxy."];
const QUESTION: &str = "Where does the key stay?";

/// Runs Codex with a provider that is the proxy and has these settings, too; what it prints.
fn run(codex: &str, proxy: &Proxy, settings: &str) -> String {
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

/// Sends what codex-cli 0.169.0 sent, as far as it matters here, and tells the words of the answer.
fn replay(proxy: &Proxy) -> String {
    let mut client = proxy.client();
    let message = json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": QUESTION }] });
    let body = json!({ "model": "any", "input": [message], "stream": true, "store": false });
    let types = "Accept: text/event-stream\r\nContent-Type: application/json\r\n";
    let headers = format!("{types}Originator: codex_exec\r\n");
    let answer = client.post(&headers, body.to_string()).unwrap();
    let answer = String::from_utf8(answer.body).unwrap();
    let lines = answer.lines();
    let data = lines.filter_map(|line| line.strip_prefix("data: ")?.parse::<Value>().ok());
    let delta = |event: Value| event["delta"].as_str().unwrap_or_default().to_owned();
    data.map(delta).collect()
}

#[test]
fn codex_without_a_key_prints_what_it_streamed_through_the_proxy() {
    let (upstream, mut proxy) = serve(|request| {
        request.read_body()?;
        request.respond_with_events(&events(&WORDS))
    });
    let printed = match find_codex() {
        Some(codex) => run(&codex, &proxy, ""),
        None => {
            let why = "no `codex` on PATH, nor named by CODEX: what it sent is replayed";
            skip("running Codex through the proxy", why);
            replay(&proxy)
        }
    };
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

/// Speaks the Responses API over a WebSocket, and tells what it was asked.
fn respond(request: &mut UpstreamRequest<'_>, tell: &Sender<Value>) -> io::Result<()> {
    let mut socket = request.websocket()?;
    while let Some((request, events)) = next_request(&mut socket, &WORDS) {
        for event in events {
            socket.send(event).map_err(io::Error::other)?;
        }
        tell.send(request).unwrap();
    }
    Ok(())
}

/// Replays the handshake and the requests of codex-cli 0.169.0, as far as they matter here; the words of the response.
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
    let (tell, told) = channel();
    let upstream = Upstream::start(move |request| respond(request, &tell));
    let mut proxy = start_with_websocket(&upstream);
    let printed = match find_codex() {
        Some(codex) => run(&codex, &proxy, ", supports_websockets = true"),
        None => {
            let why = "no `codex` on PATH, nor named by CODEX: its handshake is replayed";
            skip("running Codex over a WebSocket", why);
            replay_websocket(&proxy)
        }
    };
    assert_eq!(printed, WORDS.concat());
    let [first, second] = [(); 2].map(|()| told.recv().unwrap());
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
fn codex_falls_back_to_post_at_once_where_bodies_are_dumped() {
    let Some(codex) = find_codex() else {
        let why = "no `codex` on PATH, nor named by CODEX";
        return skip("running Codex with --websocket and --dump-dir", why);
    };
    let upstream = Upstream::start(|request| {
        request.read_body()?;
        request.respond_with_events(&events(&WORDS))
    });
    let dir = TestDir::new();
    let command = ProxyCommand::for_upstream(&upstream).args(["--websocket", "--dump-dir"]);
    let mut proxy = command.arg(dir.join("dumps")).start();
    let printed = run(&codex, &proxy, ", supports_websockets = true");
    assert_eq!(printed, WORDS.concat());
    // One handshake, and then no more of them.
    proxy.wait_for_request("refused ", &[" status=426 "]);
    proxy.wait_for_request("request ", &[" status=200 "]);
}
