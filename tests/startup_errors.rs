//! Startup errors: exit at once, before the key is read, with a non-zero status and one line on stderr.

mod support;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::{ffi::OsStr, fs, net::TcpListener, os::unix::ffi::OsStrExt};
use support::*;

#[test]
fn invalid_flags_exit_with_2_and_no_value_is_repeated() {
    // A user may pass the key as an argument by mistake.
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
fn invalid_urls_are_reported_by_source_and_not_repeated() {
    // The unit tests of `upstream` have more cases.
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
    for (source, value) in urls.into_iter().chain(proxies) {
        let command = ProxyCommand::without_key();
        let value = OsStr::from_bytes(value);
        let command = match source.starts_with('-') {
            true => command.arg(source).arg(value),
            false => command.url("https://127.0.0.1:9/").env(source, value),
        };
        let name = format!("{source} {value:?}");
        let line = command.assert_startup_error(&name, 1, &[source]);
        assert!(!line.contains("hunter2"), "{name}: {line}");
    }
}

#[test]
fn unusable_ca_file_is_reported_by_path() {
    let dir = TestDir::new();
    let pem = |what: &str, inside: &str| {
        format!("-----BEGIN {what}-----\n{inside}\n-----END {what}-----\n").into_bytes()
    };
    let cases = [
        ("empty", Vec::new()),
        ("text", b"this is no certificate\n".into()),
        ("binary", vec![0xff, 0, 0xfe, 0x30, 0x82]),
        ("truncated", b"-----BEGIN CERTIFICATE-----\nMIIB".into()),
        ("invalid base64", pem("CERTIFICATE", "!!!!")),
        ("invalid certificate", pem("CERTIFICATE", "aGVsbG8=")),
        ("private key", pem("PRIVATE KEY", "aGVsbG8=")),
    ];
    for (name, content) in &cases {
        fs::write(dir.join(name), content).unwrap();
    }
    let files = cases.map(|(name, _)| dir.join(name)).into_iter();
    for path in files.chain([dir.join("missing"), dir.to_owned()]) {
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
fn unwritable_info_file_is_reported_by_path() {
    let dir = TestDir::new();
    fs::write(dir.join("file"), "").unwrap();
    fs::create_dir(dir.join("dir")).unwrap();
    let unwritable = Path::new("/proc/codex-responses-proxy/info.json");
    let fifo = dir.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let in_dir = ["file/info.json", "dir", "fifo"].map(|name| dir.join(name));
    let devices = ["/dev/null", "/dev/stdout", "/dev/info.json", "/"].map(PathBuf::from);
    let all = in_dir.iter().chain(&devices).map(PathBuf::as_path);
    for path in all.chain([unwritable]) {
        if path == unwritable && !Path::new("/proc/self").exists() {
            skip("a directory that no user can write to", "no /proc here");
            continue;
        }
        let command = ProxyCommand::without_key().arg("--server-info").arg(path);
        let path = path.to_str().unwrap();
        command.assert_startup_error(path, 1, &[path]);
    }
    let left = fs::read_dir(&*dir).unwrap().count();
    assert_eq!(left, 3, "no temporary file is left");
    assert!(fifo.metadata().unwrap().file_type().is_fifo());
    assert!(devices[0].metadata().unwrap().file_type().is_char_device());
}

#[test]
fn port_in_use_is_reported() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let command = ProxyCommand::without_key().args(["--port", &port]);
    command.assert_startup_error("a port in use", 1, &[&port]);
}

#[test]
fn unusable_no_proxy_entries_are_logged_if_a_proxy_is_set() {
    let upstream = Upstream::start(ok);
    let usual = "*.local, 169.254/16, [::1], localhost:8080, x*, localhost";
    for proxy in ["", "http://127.0.0.1:9"] {
        let command = ProxyCommand::for_upstream(&upstream).env("ALL_PROXY", proxy);
        let mut running = command.env("NO_PROXY", usual).start();
        assert_eq!(running.post_default().status(), 200, "{proxy}");
        running.wait_for_request("request ", &["status=200"]);
        let mut lines = running.log.clone();
        lines.retain(|line| line.contains("NO_PROXY"));
        assert_eq!(lines.len(), usize::from(!proxy.is_empty()), "{lines:?}");
        let unusable = r#"["169.254/16", "x*"]"#;
        assert!(lines.iter().all(|line| line.contains(unusable)));
    }
}

#[test]
fn inapplicable_upstream_user_is_rejected() {
    for (url, user) in [
        ("https://localhost/", "0"),
        ("http://localhost/", "no-such-user-here"),
    ] {
        let command = ProxyCommand::without_key().url(url);
        let command = command.args(["--upstream-user", user]);
        command.assert_startup_error(url, 1, &["--upstream-user"]);
    }
}
