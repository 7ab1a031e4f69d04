//! Every command line written for OpenAI's `codex responses-api-proxy` works here with the same outcome.

mod support;

use std::{fs, net::TcpStream, os::unix::fs::symlink, path::Path, process::Command};
use support::*;

fn with_info_file(file: &Path) -> Proxy {
    Launch::new().arg("--server-info").arg(file).start()
}

fn assert_info(file: &Path, proxy: &Proxy) {
    let expected = format!("{{\"port\":{},\"pid\":{}}}\n", proxy.port, proxy.pid());
    assert_eq!(fs::read_to_string(file).unwrap(), expected);
}

#[test]
fn the_info_file_is_one_line_of_json_and_goes_with_a_clean_exit() {
    let folder = Folder::new();
    let file = folder.join("made/on/the/way/info.json");
    let proxy = with_info_file(&file);
    assert_info(&file, &proxy);
    let beside = fs::read_dir(file.parent().unwrap()).unwrap().count();
    assert_eq!(beside, 1, "what it was written to before is gone");
    assert_eq!(proxy.stop().status.code(), Some(0));
    assert!(!file.exists());
}

#[test]
fn an_info_file_that_somebody_else_has_put_there_since_stays() {
    let folder = Folder::new();
    let file = folder.join("info.json");
    let proxy = with_info_file(&file);
    let others = "{\"port\":1,\"pid\":1}\n";
    fs::remove_file(&file).unwrap();
    fs::write(&file, others).unwrap();
    assert_eq!(proxy.stop().status.code(), Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), others);
}

#[test]
fn a_link_or_an_earlier_file_where_the_info_file_goes_is_replaced_and_not_followed() {
    let folder = Folder::new();
    let (file, precious) = (folder.join("info.json"), folder.join("precious"));
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

#[test]
fn it_listens_on_the_port_that_it_is_given_and_on_loopback_only() {
    let port = free_port();
    let proxy = Launch::new().args(["--port", &port.to_string()]).start();
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
        let help = Launch::new().input_later().arg(flag).spawn();
        let run = help.wait();
        assert_eq!(run.status.code(), Some(0), "{flag}: {run:?}");
        assert_eq!(run.stderr, [""; 0], "{flag}");
        for word in words.split(' ').chain(["codex-responses-api-proxy"]) {
            assert!(run.stdout.contains(word), "{flag}: {word}: {run:?}");
        }
    }
}

/// What codex-cli 0.169.0 did: the key that went up, the answers, the statuses at the end.
const RECORDED: &str = "\
Bearer sk-a for \"sk-a\", then 200, Some(0)
Bearer sk-b for \"sk-b\\n\", then 200, Some(0)
Bearer sk-c for \"sk-c\\r\\n\", then 200, Some(0)
Bearer k_Z-09 for \"k_Z-09\\n\", then 200, Some(0)
200 POST /v1/responses
403 POST /v1/responses?
403 POST /v1/responses?a=b
403 POST /v1/responses/
403 POST /v1/responses/compact
403 POST /v1//responses
403 POST /v1/Responses
403 POST /
403 GET /v1/responses
403 PUT /v1/responses
403 DELETE /v1/responses
403 GET /v1/models
403 POST /v1/chat/completions
403 POST /shutdown
403 GET /shutdown unless enabled
Some(1) no key
Some(1) an empty line
Some(1) a space in the key
Some(1) a dot in the key
Some(1) a key that is too long
Some(2) an unknown flag
Some(2) a port that is no number
Some(2) a port that is too large
Some(1) a URL that is none
Some(0) help
";

/// What a program does, in the words of the record.
fn outcomes(program: impl Fn() -> Launch) -> String {
    let upstream = Upstream::plain(ok);
    let folder = Folder::new();
    let file = folder.join("info/server.json");
    let launch = |input: &str| {
        let launch = program().url(&upstream.url()).input(input);
        launch.arg("--server-info").arg(&file)
    };
    let mut outcomes = String::new();
    for input in ["sk-a", "sk-b\n", "sk-c\r\n", "k_Z-09\n"] {
        let proxy = launch(input).arg("--http-shutdown").start();
        let mut client = proxy.client();
        let response = client.ask_with("Authorization: Bearer theirs\r\n", "{}");
        assert_eq!(response.unwrap().status(), 200, "{input:?}");
        let head = upstream.seen().pop().unwrap().head;
        let key = head.all("authorization").join(" and ");
        let status = proxy.client().status_of("GET /shutdown").unwrap();
        let code = proxy.wait().status.code();
        outcomes += &format!("{key} for {input:?}, then {status}, {code:?}\n");
    }

    let proxy = launch("sk-requests").start();
    let is_request = |line: &&str| line.starts_with("200 ") || line.starts_with("403 ");
    for line in RECORDED.lines().filter(is_request) {
        let request = &line["200 ".len()..];
        let mut client = proxy.client();
        let line = request.trim_end_matches(" unless enabled");
        let headers = "Host: localhost\r\nContent-Length: 0\r\n\r\n";
        let head = format!("{line} HTTP/1.1\r\n{headers}");
        client.send(head).unwrap();
        let status = client.response().unwrap().status();
        outcomes += &format!("{status} {request}\n");
    }
    let info = fs::read_to_string(&file).unwrap();
    let json: serde_json::Value = serde_json::from_str(&info).unwrap();
    let (port, pid) = (proxy.port, json["pid"].as_u64().unwrap());
    assert_eq!(info, format!("{{\"port\":{port},\"pid\":{pid}}}\n"));
    drop(proxy);

    let long = "k".repeat(2000);
    for (name, input, args) in [
        ("no key", "", ""),
        ("an empty line", "\n", ""),
        ("a space in the key", "sk a\n", ""),
        ("a dot in the key", "sk.a\n", ""),
        ("a key that is too long", &long, ""),
        ("an unknown flag", "sk-a", "--no-such-flag"),
        ("a port that is no number", "sk-a", "--port x"),
        ("a port that is too large", "sk-a", "--port 65536"),
        ("a URL that is none", "sk-a", "--upstream-url /no"),
        ("help", "sk-a", "--help"),
    ] {
        let launch = program().input(input).args(args.split_whitespace());
        outcomes += &format!("{:?} {name}\n", launch.finish().status.code());
    }
    outcomes
}

#[test]
fn openais_own_does_the_same() {
    assert_eq!(outcomes(Launch::new), RECORDED);
    let Some(codex) = codex() else {
        let why = "no `codex` on PATH, nor named by CODEX: compared with what was recorded";
        return skip("running OpenAI's own", why);
    };
    let home = Folder::new();
    let theirs = outcomes(|| {
        let launch = Launch::of(Command::new(&codex)).arg("responses-api-proxy");
        launch.env("CODEX_HOME", &*home)
    });
    assert_eq!(theirs, RECORDED);
}
