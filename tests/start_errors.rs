//! Whatever is wrong at the start ends the program at once, non-zero, with one sentence that says what, and no panic.

mod support;

use std::{ffi::OsStr, fs, net::TcpListener, os::unix::ffi::OsStrExt};
use support::{
    Folder,
    proxy::{KEY, Launch, assert_one_sentence},
    skip,
};

#[test]
fn a_bad_flag_is_one_sentence_that_repeats_no_value_and_ends_with_2() {
    // Somebody may give the key itself where it doesn't belong.
    let cases: [(&str, &[&str], &str); 13] = [
        ("an unknown flag", &["--no-such-flag"], "--help"),
        ("an unknown short flag", &["-x"], "--help"),
        ("the key as a flag", &[&format!("--{KEY}")], "stdin"),
        ("the key as an argument", &[KEY], "stdin"),
        (
            "the key behind a flag's own",
            &["--port", "1", KEY],
            "stdin",
        ),
        ("the key as a port", &["--port", KEY], "--port"),
        ("a port that is too large", &["--port", "65536"], "--port"),
        ("a negative port", &["--port=-1"], "--port"),
        ("no port behind the flag", &["--port"], "--port"),
        (
            "no file behind the flag",
            &["--server-info"],
            "--server-info",
        ),
        (
            "an empty file name",
            &["--server-info", ""],
            "--server-info",
        ),
        (
            "a value for a flag without one",
            &[&format!("--http-shutdown={KEY}")],
            "--help",
        ),
        (
            "a flag given twice",
            &["--port", "1", "--port", "2"],
            "--port",
        ),
    ];
    for (name, args, word) in cases {
        assert_one_sentence(name, 2, &Launch::new().args(args).finish(), &[word]);
    }
    let url = OsStr::from_bytes(b"https://\xff/");
    let not_utf8 = Launch::new().arg("--upstream-url").arg(url).finish();
    assert_one_sentence("a URL that is not UTF-8", 2, &not_utf8, &["--help"]);
}

#[test]
fn an_unusable_upstream_url_is_one_sentence_that_does_not_repeat_it() {
    let cases = [
        ("empty", ""),
        ("a path", "/v1/hunter2"),
        ("no scheme", "hunter2.example/v1/responses"),
        ("another scheme", "ftp://hunter2.example/"),
        ("a scheme with a letter more", "httpss://hunter2.example/"),
        (
            "http to another host",
            "http://hunter2.example/v1/responses",
        ),
        (
            "http to an address of another host",
            "http://192.0.2.1/hunter2",
        ),
        (
            "http to a name that begins like loopback",
            "http://127.0.0.1.hunter2.example/",
        ),
        ("http to all addresses", "http://0.0.0.0/hunter2"),
        ("user info", "https://hunter2@localhost/v1/responses"),
        (
            "user info and password",
            "https://user:hunter2@localhost/v1/responses",
        ),
        (
            "user info that looks like a loopback host",
            "http://localhost:80@hunter2.example/",
        ),
        ("a fragment", "https://localhost/v1/responses#hunter2"),
        ("an empty fragment", "https://localhost/hunter2#"),
        ("no host", "https:///v1/hunter2"),
        ("only a port", "https://:443/hunter2"),
        (
            "a port that is too large",
            "https://localhost:65536/hunter2",
        ),
        ("a port that is no number", "https://localhost:http/hunter2"),
        ("port 0", "https://localhost:0/hunter2"),
        ("a space", "https://localhost/v1/hunter2 responses"),
        ("a newline", "https://localhost/v1/hunter2\r\nX-Header: 1"),
        ("an address that is cut short", "https://[::1/hunter2"),
    ];
    for (name, url) in cases {
        let run = Launch::new().args(["--upstream-url", url]).finish();
        assert_one_sentence(name, 1, &run, &["--upstream-url"]);
        assert!(!run.stderr[0].contains("hunter2"), "{name}: {run:?}");
    }
}

#[test]
fn an_unusable_ca_file_is_one_sentence_that_names_it() {
    let folder = Folder::new();
    let file = |name: &str, content: &[u8]| {
        fs::write(folder.join(name), content).unwrap();
        folder.join(name)
    };
    let begin = "-----BEGIN CERTIFICATE-----";
    let end = "-----END CERTIFICATE-----";
    let cases = [
        ("no such file", folder.join("none.pem")),
        ("a folder", folder.path().to_owned()),
        ("an empty file", file("empty.pem", b"")),
        ("no PEM", file("text.pem", b"this is no certificate\n")),
        (
            "not even text",
            file("binary.pem", &[0xff, 0, 0xfe, 0x30, 0x82]),
        ),
        (
            "PEM that is cut short",
            file("cut.pem", format!("{begin}\nMIIB").as_bytes()),
        ),
        (
            "PEM that is not base64",
            file("bytes.pem", format!("{begin}\n!!!!\n{end}\n").as_bytes()),
        ),
        (
            "PEM that holds no certificate",
            file(
                "none-in.pem",
                format!("{begin}\naGVsbG8=\n{end}\n").as_bytes(),
            ),
        ),
        (
            "a key",
            file(
                "key.pem",
                b"-----BEGIN PRIVATE KEY-----\naGVsbG8=\n-----END PRIVATE KEY-----\n",
            ),
        ),
    ];
    for (name, path) in cases {
        let run = Launch::new().arg("--upstream-ca").arg(&path).finish();
        assert_one_sentence(name, 1, &run, &[path.to_str().unwrap()]);
    }
}

#[test]
fn an_info_file_that_cannot_be_written_is_one_sentence_that_names_it() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "").unwrap();
    fs::create_dir(folder.join("folder")).unwrap();
    let cases = [
        ("under a file", folder.join("file/info.json")),
        ("at a folder", folder.join("folder")),
        (
            "where nobody can write",
            "/proc/codex-responses-proxy/info.json".into(),
        ),
        ("without a name", "/".into()),
    ];
    for (name, path) in cases {
        if name == "where nobody can write" && !std::path::Path::new("/proc/self").exists() {
            skip(name, "no /proc here");
            continue;
        }
        let run = Launch::new().arg("--server-info").arg(&path).finish();
        assert_one_sentence(name, 1, &run, &[path.to_str().unwrap()]);
    }
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        2,
        "nothing is left behind"
    );
}

#[test]
fn a_port_that_is_taken_is_one_sentence_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let run = Launch::new().args(["--port", &port]).finish();
    assert_one_sentence("a taken port", 1, &run, &[&port]);
}

#[test]
fn a_proxy_value_that_would_be_ignored_is_one_sentence_that_names_the_variable() {
    let cases = [
        ("HTTPS_PROXY", "socks5://hunter2:1080"),
        ("https_proxy", "https://hunter2.example:443"),
        ("ALL_PROXY", "ftp://hunter2"),
        ("all_proxy", "http://"),
        ("HTTPS_PROXY", "http://hunter2 .example"),
        ("HTTPS_PROXY", "http://user:hunter2@"),
        ("HTTPS_PROXY", "http://hunter2:port"),
        ("HTTPS_PROXY", "http://hunter2:99999"),
        ("HTTPS_PROXY", "http://hunter2:"),
        ("ALL_PROXY", "hunter2:0"),
    ];
    for (variable, value) in cases {
        let launch = Launch::new().args(["--upstream-url", "https://127.0.0.1:9/"]);
        let run = launch.env(variable, value).finish();
        assert_one_sentence(&format!("{variable}={value}"), 1, &run, &[variable]);
        assert!(
            !run.stderr[0].contains("hunter2"),
            "{variable}={value}: {run:?}"
        );
    }
    let not_utf8 = OsStr::from_bytes(b"http://\xff");
    let run = Launch::new().env("HTTPS_PROXY", not_utf8).finish();
    assert_one_sentence("a value that is not UTF-8", 1, &run, &["HTTPS_PROXY"]);
}
