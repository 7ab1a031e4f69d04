//! What `--dump-dir` writes: whole exchanges without the keys, for their owner's eyes, and never at the exchange's
//! expense.

mod support;

use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, mpsc},
};
use support::{
    Folder, PATIENCE,
    client::Client,
    is_root,
    proxy::{KEY, Launch, Proxy},
    skip,
    upstream::{Upstream, ok},
};

fn dumping(upstream: &Upstream, folder: &Path) -> Launch {
    Launch::to(upstream).arg("--dump-dir").arg(folder)
}

/// The files of a folder, in the order of their names.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Number, milliseconds and kind of a file.
fn parts(path: &Path) -> (String, u128, String) {
    let name = path.file_name().unwrap().to_str().unwrap();
    let parts: Vec<_> = name.strip_suffix(".json").expect(name).split('-').collect();
    let [number, milliseconds, kind] = parts.as_slice() else {
        panic!("{name}");
    };
    assert_eq!(number.len(), 6, "{name}");
    (
        (*number).to_owned(),
        milliseconds.parse().expect(name),
        (*kind).to_owned(),
    )
}

fn json_of(path: &Path) -> Value {
    let content = fs::read(path).unwrap();
    assert!(
        !String::from_utf8_lossy(&content).contains(KEY),
        "the key is in {path:?}"
    );
    serde_json::from_slice(&content).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

/// The values of a header in a dump, in order.
fn header<'a>(dump: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = dump["headers"].as_array().unwrap().iter();
    headers
        .filter(|header| header["name"] == name)
        .map(|header| header["value"].as_str().unwrap())
        .collect()
}

#[test]
fn each_exchange_is_two_files_for_their_owner_alone() {
    let upstream = Upstream::start(|exchange| {
        exchange.body()?;
        exchange.answer(
            "429 Too Many Requests",
            "Retry-After: 7\r\nX-Twice: 1\r\nX-Twice: 2\r\nContent-Type: application/json\r\n",
            b"{\"error\": [1.50, null]}",
        )
    });
    let folder = Folder::new();
    let dumps = folder.join("new/dumps");
    let proxy = dumping(&upstream, &dumps).start();
    assert_eq!(mode(&dumps), 0o700);
    assert_eq!(mode(&folder.join("new")) & 0o022, 0);
    for _ in 0..2 {
        let mut client = Client::connect(proxy.port);
        let headers = "X-Twice: a\r\nAuthorization: Bearer sk-their-own\r\nx-twice: b\r\n\
            AUTHORIZATION: Basic c2stdGhlaXItb3du\r\n";
        client.post(headers, b"{\"input\": \"hello\"}").unwrap();
        assert_eq!(client.response().unwrap().status(), 429);
    }
    // What is refused is no exchange.
    let mut refused = Client::connect(proxy.port);
    refused
        .send("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        .unwrap();
    assert_eq!(refused.response().unwrap().status(), 403);
    drop(refused);
    assert_eq!(proxy.stop().status.code(), Some(0));

    let files = files(&dumps);
    let names: Vec<_> = files.iter().map(|path| parts(path)).collect();
    let kinds = names.iter().map(|(n, _, k)| (n.as_str(), k.as_str()));
    assert_eq!(
        kinds.collect::<Vec<_>>(),
        [
            ("000001", "request"),
            ("000001", "response"),
            ("000002", "request"),
            ("000002", "response")
        ]
    );
    assert_eq!(names[0].1, names[1].1, "both have the time of the request");
    assert!(names[0].1 > 1_700_000_000_000 && names[0].1 <= names[2].1);
    for pair in files.chunks(2) {
        assert_eq!((mode(&pair[0]), mode(&pair[1])), (0o600, 0o600));
        let (request, response) = (json_of(&pair[0]), json_of(&pair[1]));
        assert_eq!(request["method"], "POST");
        assert!(request["url"].as_str().unwrap().ends_with("/v1/responses"));
        assert_eq!(request["body"], json!({"input": "hello"}));
        assert_eq!(header(&request, "x-twice"), ["a", "b"]);
        assert_eq!(header(&request, "content-length"), ["18"]);
        assert_eq!(
            header(&request, "authorization"),
            ["[REDACTED]", "[REDACTED]"]
        );
        assert!(!request.to_string().contains("their-own"));
        assert_eq!(response["status"], 429);
        assert_eq!(response["body"], json!({"error": [1.5, null]}));
        assert_eq!(header(&response, "x-twice"), ["1", "2"]);
        assert_eq!(header(&response, "retry-after"), ["7"]);
    }
}

#[test]
fn a_body_is_json_where_it_is_that_and_text_where_it_is_not() {
    let cases: [(&str, &[u8], Value); 9] = [
        (
            "an object",
            b" {\"a\": [1, \"\\u00e9\"]}\n",
            json!({"a": [1, "é"]}),
        ),
        ("a number", b"17", json!(17)),
        (
            "events",
            b"event: x\ndata: {\"a\": \"b\"}\n\ndata: [DONE]\n\n",
            json!("event: x\ndata: {\"a\": \"b\"}\n\ndata: [DONE]\n\n"),
        ),
        ("nothing", b"", json!("")),
        ("JSON that is cut short", b"{\"a\": ", json!("{\"a\": ")),
        ("two values", b"{}{}", json!("{}{}")),
        (
            "control characters",
            b"a\0\x1b\"\\\r\n",
            json!("a\0\u{1b}\"\\\r\n"),
        ),
        ("no UTF-8", b"a\xff\xe2\x82", json!("a\u{fffd}\u{fffd}")),
        (
            "no UTF-8 in JSON",
            b"{\"a\": \"\xff\"}",
            json!({"a": "\u{fffd}"}),
        ),
    ];
    let upstream = Upstream::start(|exchange| {
        let body = exchange.body()?.to_vec();
        exchange.answer("200 OK", "", &body)
    });
    let folder = Folder::new();
    let dumps = folder.join("dumps");
    let proxy = dumping(&upstream, &dumps).start();
    let mut client = Client::connect(proxy.port);
    for (name, body, _) in &cases {
        client.post("", body).unwrap();
        assert_eq!(&client.response().unwrap().body, body, "{name}");
    }
    drop(client);
    proxy.stop();
    let files = files(&dumps);
    assert_eq!(files.len(), 2 * cases.len());
    for ((name, _, expected), pair) in cases.iter().zip(files.chunks(2)) {
        for path in pair {
            assert_eq!(&json_of(path)["body"], expected, "{name}: {path:?}");
        }
    }
}

#[test]
fn what_breaks_off_is_dumped_as_far_as_it_came() {
    let (go_on, held) = mpsc::channel::<()>();
    let held = Mutex::new(held);
    let (report, reports) = mpsc::channel();
    let upstream = Upstream::start(move |exchange| {
        let breaks = exchange.body()? == b"breaks";
        exchange.begin_events()?;
        exchange.chunk("data: 1\n\n")?;
        if breaks {
            held.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            return exchange.cut();
        }
        report.send(exchange.wait_until_left().is_ok()).unwrap();
        Ok(())
    });
    let folder = Folder::new();
    let dumps = folder.join("dumps");
    let proxy = dumping(&upstream, &dumps).start();
    for body in ["breaks", "leaves"] {
        let mut client = Client::connect(proxy.port);
        client.post("", body.as_bytes()).unwrap();
        client.head().unwrap();
        client.piece().unwrap();
        match body {
            "breaks" => {
                go_on.send(()).unwrap();
                client.rest().unwrap_err();
            }
            _ => {
                drop(client);
                assert_eq!(reports.recv_timeout(PATIENCE), Ok(true));
            }
        }
    }
    proxy.stop();
    let files = files(&dumps);
    let bodies = files.iter().map(|path| json_of(path)["body"].clone());
    assert_eq!(
        bodies.collect::<Vec<_>>(),
        ["breaks", "data: 1\n\n", "leaves", "data: 1\n\n"].map(Value::from)
    );
}

#[test]
fn a_stream_is_not_held_back() {
    let (come, arrivals) = mpsc::channel::<()>();
    let arrivals = Mutex::new(arrivals);
    let upstream = Upstream::start(move |exchange| {
        exchange.body()?;
        exchange.begin_events()?;
        for number in 0..50 {
            exchange.chunk(&format!("data: {number}\n\n"))?;
            // The next one is sent when this one is there.
            let arrivals = arrivals.lock().unwrap();
            arrivals.recv_timeout(PATIENCE).unwrap();
        }
        exchange.chunk("")
    });
    let folder = Folder::new();
    let dumps = folder.join("dumps");
    let proxy = dumping(&upstream, &dumps).start();
    let mut client = Client::connect(proxy.port);
    client.post("", b"{}").unwrap();
    client.head().unwrap();
    let mut whole = String::new();
    while let Some(piece) = client.piece().unwrap() {
        whole += std::str::from_utf8(&piece).unwrap();
        come.send(()).unwrap();
    }
    assert!(whole.ends_with("data: 49\n\n"), "{whole:?}");
    drop(client);
    proxy.stop();
    assert_eq!(json_of(&files(&dumps)[1])["body"], whole);
}

#[test]
fn a_folder_that_others_may_enter_or_that_cannot_be_made_is_one_sentence() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "").unwrap();
    let open = |mode| {
        let path = folder.join(&format!("{mode:o}"));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    };
    let strangers = open(0o700);
    if is_root() {
        std::os::unix::fs::chown(&strangers, Some(65534), None).unwrap();
    } else {
        skip(
            "a folder that is somebody else's",
            "only root can give one away",
        );
        fs::set_permissions(&strangers, PermissionsExt::from_mode(0o707)).unwrap();
    }
    for (name, path) in [
        ("somebody else's", strangers),
        ("others may enter", open(0o755)),
        ("others may list", open(0o704)),
        ("a group may write", open(0o720)),
        ("a file", folder.join("file")),
        ("under a file", folder.join("file/dumps")),
    ] {
        let run = Launch::new().arg("--dump-dir").arg(&path).finish();
        assert_eq!(run.status.code(), Some(1), "{name}: {run:?}");
        let [line] = run.stderr.as_slice() else {
            panic!("{name}: not one line: {run:?}");
        };
        assert!(
            line.contains("--dump-dir") && line.contains(path.to_str().unwrap()),
            "{name}: {line}"
        );
    }
}

#[test]
fn nothing_is_written_unless_asked_for() {
    let upstream = Upstream::start(ok);
    let folder = Folder::new();
    let mut launch = Launch::to(&upstream);
    launch.command().current_dir(folder.path());
    let proxy = launch.env("TMPDIR", folder.path()).start();
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    proxy.stop();
    assert_eq!(files(folder.path()), [""; 0].map(PathBuf::from));
}

/// Asks for two exchanges that can't be dumped, which nobody but the log notices.
fn assert_unharmed(name: &str, proxy: &mut Proxy) {
    let mut client = Client::connect(proxy.port);
    for _ in 0..2 {
        assert_eq!(client.ask().unwrap().status(), 200, "{name}");
        for kind in ["-request.json", "-response.json"] {
            proxy.wait_for_line(|line| line.contains("cannot write") && line.contains(kind));
        }
    }
}

#[test]
fn a_folder_that_goes_away_harms_no_exchange_and_is_logged() {
    let upstream = Upstream::start(ok);
    let folder = Folder::new();
    let dumps = folder.join("dumps");
    let mut proxy = dumping(&upstream, &dumps).start();
    fs::rename(&dumps, folder.join("elsewhere")).unwrap();
    assert_unharmed("gone", &mut proxy);
    fs::write(&dumps, "").unwrap();
    assert_unharmed("a file", &mut proxy);
    fs::remove_file(&dumps).unwrap();
    fs::rename(folder.join("elsewhere"), &dumps).unwrap();
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    proxy.stop();
    let names: Vec<_> = files(&dumps).iter().map(|path| parts(path)).collect();
    let is_last = |(number, ..): &(String, u128, String)| number == "000005";
    assert!(names.len() == 2 && names.iter().all(is_last), "{names:?}");
}
