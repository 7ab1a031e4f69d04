//! Whatever is wrong at the start ends the program at once, non-zero, with one sentence that says what, and no panic.

mod support;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::{ffi::OsStr, fs, net::TcpListener, os::unix::ffi::OsStrExt};
use support::*;

#[test]
fn a_bad_flag_is_one_sentence_that_repeats_no_value_and_ends_with_2() {
    // Somebody may give the key itself where it doesn't belong.
    for (args, word) in [
        ("--no-such-flag", "--help"),
        ("-x", "--help"),
        ("--KEY", "stdin"),
        ("KEY", "stdin"),
        ("--port 1 KEY", "stdin"),
        ("--port KEY", "--port"),
        ("--port 65536", "--port"),
        ("--port=-1", "--port"),
        ("--port", "--port"),
        ("--port 1 --port 2", "--port"),
        ("--server-info", "--server-info"),
        ("--server-info=", "--server-info"),
        ("--http-shutdown=KEY", "--help"),
    ] {
        let given = args.replace("KEY", KEY);
        let command = ProxyCommand::without_key().args(given.split(' '));
        command.assert_startup_error(args, 2, &[word]);
    }
    let not_utf8 = OsStr::from_bytes(b"https://\xff/");
    let command = ProxyCommand::without_key()
        .arg("--upstream-url")
        .arg(not_utf8);
    command.assert_startup_error("a URL that is not UTF-8", 2, &["--help"]);
}

#[test]
fn an_unusable_url_or_proxy_is_one_sentence_that_says_where_it_is_and_does_not_repeat_it() {
    // The modules that take them apart have many more.
    let urls = [
        "http://127.0.0.1.hunter2.example/",
        "http://0.0.0.0/hunter2",
        "http://localhost:80@hunter2.example/",
        "https://localhost:http/hunter2",
        "https://localhost/v1/hunter2\r\nX-Header: 1",
        "https://[::1/hunter2",
    ];
    let proxies = [
        ("HTTPS_PROXY", b"socks5://hunter2:1080".as_slice()),
        ("ALL_PROXY", b"http://user:hunter2@"),
        ("HTTPS_PROXY", b"http://\xff"),
    ];
    let urls = urls.map(|url| ("--upstream-url", url.as_bytes()));
    for (given, value) in urls.into_iter().chain(proxies) {
        let command = ProxyCommand::without_key();
        let value = OsStr::from_bytes(value);
        let command = match given.starts_with('-') {
            true => command.arg(given).arg(value),
            false => command.url("https://127.0.0.1:9/").env(given, value),
        };
        let name = format!("{given} {value:?}");
        let line = command.assert_startup_error(&name, 1, &[given]);
        assert!(!line.contains("hunter2"), "{name}: {line}");
    }
}

#[test]
fn an_unusable_ca_file_is_one_sentence_that_names_it() {
    let dir = TestDir::new();
    let pem = |what: &str, inside: &str| {
        format!("-----BEGIN {what}-----\n{inside}\n-----END {what}-----\n").into_bytes()
    };
    let cases = [
        ("empty", Vec::new()),
        ("text", b"this is no certificate\n".into()),
        ("no text", vec![0xff, 0, 0xfe, 0x30, 0x82]),
        ("cut short", b"-----BEGIN CERTIFICATE-----\nMIIB".into()),
        ("no base64", pem("CERTIFICATE", "!!!!")),
        ("no certificate", pem("CERTIFICATE", "aGVsbG8=")),
        ("a key", pem("PRIVATE KEY", "aGVsbG8=")),
    ];
    for (name, content) in &cases {
        fs::write(dir.join(name), content).unwrap();
    }
    let files = cases.map(|(name, _)| dir.join(name)).into_iter();
    for path in files.chain([dir.join("none"), dir.to_owned()]) {
        let flag = ProxyCommand::without_key().arg("--upstream-ca").arg(&path);
        let variable = |name| ProxyCommand::without_key().env(name, &path);
        for (source, command) in [
            ("--upstream-ca", flag),
            ("CODEX_CA_CERTIFICATE", variable("CODEX_CA_CERTIFICATE")),
            ("SSL_CERT_FILE", variable("SSL_CERT_FILE")),
        ] {
            let path = path.to_str().unwrap();
            command.assert_startup_error(path, 1, &[source, path]);
        }
    }
}

#[test]
fn an_info_file_that_cannot_be_written_is_one_sentence_that_names_it() {
    let dir = TestDir::new();
    fs::write(dir.join("file"), "").unwrap();
    fs::create_dir(dir.join("dir")).unwrap();
    let nobody_can = Path::new("/proc/codex-responses-proxy/info.json");
    let fifo = dir.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let ours = ["file/info.json", "dir", "fifo"].map(|name| dir.join(name));
    let devices = ["/dev/null", "/dev/stdout", "/dev/info.json", "/"].map(PathBuf::from);
    let all = ours.iter().chain(&devices).map(PathBuf::as_path);
    for path in all.chain([nobody_can]) {
        if path == nobody_can && !Path::new("/proc/self").exists() {
            skip("a place where nobody can write", "no /proc here");
            continue;
        }
        let command = ProxyCommand::without_key().arg("--server-info").arg(path);
        let path = path.to_str().unwrap();
        command.assert_startup_error(path, 1, &[path]);
    }
    let left = fs::read_dir(&*dir).unwrap().count();
    assert_eq!(left, 3, "nothing is left behind");
    assert!(fifo.metadata().unwrap().file_type().is_fifo());
    assert!(devices[0].metadata().unwrap().file_type().is_char_device());
}

#[test]
fn a_port_that_is_taken_is_one_sentence_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let command = ProxyCommand::without_key().args(["--port", &port]);
    command.assert_startup_error("a taken port", 1, &[&port]);
}

#[test]
fn no_proxy_is_read_only_with_a_proxy_and_what_it_cannot_say_is_one_line() {
    let upstream = Upstream::start(ok);
    let usual = "*.local, 169.254/16, [::1], localhost:8080, x*, localhost";
    for proxy in ["", "http://127.0.0.1:9"] {
        let command = ProxyCommand::for_upstream(&upstream).env("ALL_PROXY", proxy);
        let mut running = command.env("NO_PROXY", usual).start();
        assert_eq!(running.post_default().status(), 200, "{proxy}");
        running.wait_for_request("request ", &["status=200"]);
        let mut named = running.log.clone();
        named.retain(|line| line.contains("NO_PROXY"));
        assert_eq!(named.len(), usize::from(!proxy.is_empty()), "{named:?}");
        let unusable = r#"["169.254/16", "x*"]"#;
        assert!(named.iter().all(|line| line.contains(unusable)));
    }
}

#[test]
fn upstream_user_that_cannot_apply_is_one_sentence() {
    for (url, user) in [
        ("https://localhost/", "0"),
        ("http://localhost/", "no-such-user-here"),
    ] {
        let command = ProxyCommand::without_key().url(url);
        let command = command.args(["--upstream-user", user]);
        command.assert_startup_error(url, 1, &["--upstream-user"]);
    }
}
