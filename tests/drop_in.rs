//! Every command line written for OpenAI's `codex responses-api-proxy` works here with the same outcome.

mod support;

use std::{fs, os::unix::fs::symlink, process::Command};
use support::{
    Folder,
    client::Client,
    codex, free_port,
    proxy::{KEY, Launch, PROGRAM, Proxy},
    skip,
    upstream::{Upstream, ok},
};

#[test]
fn the_key_goes_upstream_as_a_bearer_token_and_in_place_of_the_clients() {
    let upstream = Upstream::start(ok);
    let proxy = Launch::to(&upstream).start();
    let mut client = Client::connect(proxy.port);
    client
        .post(
            "Authorization: Bearer theirs\r\nauthorization: Basic too\r\n",
            b"{}",
        )
        .unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    let authorization = upstream.only().head;
    assert_eq!(
        authorization.all("authorization"),
        [format!("Bearer {KEY}")]
    );
}

#[test]
fn the_info_file_is_one_line_of_json_with_port_and_pid() {
    let folder = Folder::new();
    let file = folder.join("made/on/the/way/info.json");
    let mut proxy = Launch::new().arg("--server-info").arg(&file).start();
    let expected = format!("{{\"port\":{},\"pid\":{}}}\n", proxy.port, proxy.pid());
    assert_eq!(fs::read_to_string(&file).unwrap(), expected);
    let beside = fs::read_dir(file.parent().unwrap()).unwrap().count();
    assert_eq!(beside, 1, "what it was written to before is gone");
    assert!(proxy.is_running());
}

#[test]
fn the_info_file_goes_with_a_clean_exit() {
    let folder = Folder::new();
    let file = folder.join("info.json");
    let proxy = Launch::new().arg("--server-info").arg(&file).start();
    assert!(file.exists());
    assert_eq!(proxy.stop().status.code(), Some(0));
    assert!(!file.exists());
}

#[test]
fn an_info_file_that_somebody_else_has_put_there_since_stays() {
    let folder = Folder::new();
    let file = folder.join("info.json");
    let proxy = Launch::new().arg("--server-info").arg(&file).start();
    fs::remove_file(&file).unwrap();
    fs::write(&file, "{\"port\":1,\"pid\":1}\n").unwrap();
    assert_eq!(proxy.stop().status.code(), Some(0));
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "{\"port\":1,\"pid\":1}\n"
    );
}

#[test]
fn a_link_planted_at_the_info_file_is_replaced_and_not_followed() {
    let folder = Folder::new();
    let (file, precious) = (folder.join("info.json"), folder.join("precious"));
    fs::write(&precious, "untouched").unwrap();
    symlink(&precious, &file).unwrap();
    let proxy = Launch::new().arg("--server-info").arg(&file).start();
    assert!(!fs::symlink_metadata(&file).unwrap().is_symlink());
    assert!(fs::read_to_string(&file).unwrap().starts_with("{\"port\":"));
    drop(proxy);
    assert_eq!(fs::read_to_string(&precious).unwrap(), "untouched");
}

#[test]
fn an_info_file_from_an_earlier_run_is_replaced() {
    let folder = Folder::new();
    let file = folder.join("info.json");
    fs::write(&file, "{\"port\":1,\"pid\":1}\nand more\n".repeat(100)).unwrap();
    let proxy = Launch::new().arg("--server-info").arg(&file).start();
    let expected = format!("{{\"port\":{},\"pid\":{}}}\n", proxy.port, proxy.pid());
    assert_eq!(fs::read_to_string(&file).unwrap(), expected);
}

#[test]
fn it_listens_on_the_port_that_it_is_given_and_on_loopback_only() {
    let port = free_port();
    let mut proxy = Launch::new().arg("--port").arg(port.to_string()).start();
    assert_eq!(proxy.port, port);
    let line = proxy.log.last().unwrap();
    assert_eq!(line, &format!("listening on http://127.0.0.1:{port}"));
    // Nobody else could bind this port on all addresses' other ends: only 127.0.0.1 is taken.
    std::net::TcpListener::bind(("127.0.0.2", port)).expect("127.0.0.2 is free");
    assert!(proxy.is_running());
}

#[test]
fn shutdown_over_http_ends_it_only_where_that_is_enabled() {
    let proxy = Launch::new().arg("--http-shutdown").start();
    let mut client = Client::connect(proxy.port);
    client
        .send("GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    assert_eq!(client.response().unwrap().status(), 200);
    assert_eq!(proxy.wait().status.code(), Some(0));

    let mut proxy = Launch::new().start();
    let mut client = Client::connect(proxy.port);
    client
        .send("GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    assert_eq!(client.response().unwrap().status(), 403);
    assert!(proxy.is_running());
}

#[test]
fn help_and_version_need_no_key() {
    for flag in ["--help", "-h", "--version", "-V"] {
        // Whoever asks for help at a prompt types nothing: stdin stays open.
        let help = Launch::new().input_later().arg(flag).spawn();
        let run = help.wait();
        assert_eq!(run.status.code(), Some(0), "{flag}: {run:?}");
        assert!(
            run.stdout.contains("codex-responses-api-proxy"),
            "{flag}: {run:?}"
        );
        assert_eq!(run.stderr, Vec::<String>::new(), "{flag}");
    }
    let help = Launch::new().arg("--help").finish().stdout;
    for flag in [
        "--port",
        "--server-info",
        "--http-shutdown",
        "--upstream-url",
        "--upstream-ca",
    ] {
        assert!(help.contains(flag), "{flag} is not in {help}");
    }
    let version = Launch::new().arg("--version").finish().stdout;
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}

/// What one of the two programs does with a series of commands and requests.
#[derive(Debug, PartialEq)]
struct Outcome {
    authorization: Vec<(String, Vec<String>)>,
    answers: Vec<(String, u16)>,
    info_has_port_and_pid: bool,
    info_ends_with_one_newline: bool,
    shutdown: (u16, Option<i32>),
    exit_codes: Vec<(String, Option<i32>)>,
}

impl Outcome {
    /// Tries everything on one of them.
    fn of(program: impl Fn() -> Launch) -> Self {
        let upstream = Upstream::plain(ok);
        let folder = Folder::new();
        let file = folder.join("info/server.json");
        let launch = |input: &str| {
            program()
                .args([
                    "--http-shutdown",
                    "--upstream-url",
                    &upstream.url(),
                    "--server-info",
                ])
                .arg(&file)
                .input(input)
        };

        let mut authorization = Vec::new();
        for input in [
            "sk-plain",
            "sk-newline\n",
            "sk-crlf\r\n",
            "sk_under-SCORE-09\n",
        ] {
            let proxy = launch(input).start();
            let mut client = Client::connect(proxy.port);
            client
                .post("Authorization: Bearer theirs\r\n", b"{}")
                .unwrap();
            assert_eq!(client.response().unwrap().status(), 200, "{input:?}");
            let seen = upstream.seen().pop().unwrap();
            let values = seen.head.all("authorization");
            authorization.push((
                input.to_owned(),
                values.iter().map(|&v| v.to_owned()).collect(),
            ));
            shut_down(proxy);
        }

        let proxy = launch("sk-requests").start();
        let info = fs::read_to_string(&file).unwrap();
        let json: serde_json::Value = serde_json::from_str(&info).unwrap();
        let answers = [
            "POST /v1/responses",
            "POST /v1/responses?",
            "POST /v1/responses?a=b",
            "POST /v1/responses/",
            "POST /v1/responses/compact",
            "POST /v1//responses",
            "POST /v1/Responses",
            "POST /",
            "GET /v1/responses",
            "PUT /v1/responses",
            "DELETE /v1/responses",
            "GET /v1/models",
            "POST /v1/chat/completions",
            "POST /shutdown",
        ]
        .map(|request| {
            let mut client = Client::connect(proxy.port);
            let headers = "Host: localhost\r\nContent-Length: 0\r\n";
            client
                .send(format!("{request} HTTP/1.1\r\n{headers}\r\n"))
                .unwrap();
            (request.to_owned(), client.response().unwrap().status())
        })
        .into();
        let shutdown = shut_down(proxy);

        let exit_codes = [
            ("no key", program().input("")),
            ("an empty line", program().input("\n")),
            ("a space in the key", program().input("sk a\n")),
            ("a dot in the key", program().input("sk.a\n")),
            ("a key that is too long", program().input("k".repeat(2000))),
            ("an unknown flag", program().arg("--no-such-flag")),
            ("a port that is no number", program().args(["--port", "x"])),
            (
                "a port that is too large",
                program().args(["--port", "65536"]),
            ),
            (
                "a URL that is none",
                program().args(["--upstream-url", "not a url"]),
            ),
            ("help", program().arg("--help")),
        ]
        .map(|(name, launch)| (name.to_owned(), launch.spawn()))
        .map(|(name, run)| (name, run.wait().status.code()))
        .into();

        Self {
            authorization,
            answers,
            info_has_port_and_pid: json["port"].is_u64() && json["pid"].is_u64(),
            info_ends_with_one_newline: info.ends_with("}\n") && info.lines().count() == 1,
            shutdown,
            exit_codes,
        }
    }
}

fn shut_down(proxy: Proxy) -> (u16, Option<i32>) {
    let mut client = Client::connect(proxy.port);
    client
        .send("GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    let status = client.response().unwrap().status();
    (status, proxy.wait().status.code())
}

#[test]
fn openais_own_does_the_same() {
    let Some(codex) = codex() else {
        return skip(
            "comparing with OpenAI's own",
            "no `codex` on PATH, nor named by CODEX",
        );
    };
    let home = Folder::new();
    let theirs = Outcome::of(|| {
        let launch = Launch::of(Command::new(&codex)).arg("responses-api-proxy");
        launch.env("CODEX_HOME", home.path())
    });
    let ours = Outcome::of(|| Launch::of(Command::new(PROGRAM)));
    assert_eq!(ours, theirs);
}
