//! `--dump-dir` writes requests and responses without keys to private files. Errors skip the dump and never affect the
//! request.

mod support;

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use support::*;

/// The files in a directory, sorted by name.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// An upstream, and the directory for the dumps of the proxy.
struct Dumping {
    dir: TestDir,
    upstream: Upstream,
}

impl Dumping {
    fn new(script: impl Script) -> Self {
        Self {
            dir: TestDir::new(),
            upstream: Upstream::start(script),
        }
    }

    fn dumps(&self) -> PathBuf {
        self.dir.join("new/dumps")
    }

    fn command(&self) -> ProxyCommand {
        let command = ProxyCommand::for_upstream(&self.upstream);
        command.arg("--dump-dir").arg(self.dumps())
    }

    /// The bodies in the dumps, sorted by file name.
    fn bodies(&self) -> Vec<Value> {
        let files = files(&self.dumps()).into_iter();
        files.map(|file| json_of(&file)["body"].take()).collect()
    }
}

/// The request numbers in the file names of a directory.
fn numbers(dir: &Path) -> Vec<String> {
    let number = |file: &PathBuf| parts(file)[0].clone();
    files(dir).iter().map(number).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Request number, milliseconds and kind, from the name of a file.
fn parts(path: &Path) -> [String; 3] {
    let name = path.file_name().unwrap().to_str().unwrap();
    let parts = name.strip_suffix(".json").expect(name).split('-');
    let parts: Vec<_> = parts.map(str::to_owned).collect();
    assert_eq!(parts[0].len(), 6, "{name}");
    parts.try_into().unwrap()
}

fn json_of(path: &Path) -> Value {
    let content = fs::read_to_string(path).unwrap();
    assert!(!content.contains(KEY), "the key is in {path:?}");
    serde_json::from_str(&content).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

/// The values of a header field in a dump, in order.
fn header<'a>(dump: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = dump["headers"].as_array().unwrap().iter();
    let matching = headers.filter(|header| header["name"] == name);
    let value = |header: &'a Value| header["value"].as_str().unwrap();
    matching.map(value).collect()
}

#[test]
fn request_and_response_are_dumped_to_private_files() {
    let dumping = Dumping::new(|request| {
        request.read_body()?;
        let headers = "Retry-After: 7\r\nX-Twice: 1\r\nX-Twice: 2\r\n";
        let body = b"{\"error\": [1.50, null]}";
        request.respond("429 Too Many Requests", headers, body)
    });
    let proxy = dumping.command().start();
    assert_eq!(mode(&dumping.dumps()), 0o700);
    assert_eq!(mode(&dumping.dir.join("new")) & 0o022, 0);
    for _ in 0..2 {
        let headers = "X-Twice: a\r\nAuthorization: Bearer sk-of-client\r\nx-twice: b\r\n\
            AUTHORIZATION: Basic c2stb2YtY2xpZW50\r\n";
        let body = "{\"input\": \"hello\"}";
        let response = proxy.client().post(headers, body).unwrap();
        assert_eq!(response.status(), 429);
    }
    // Rejected requests are not dumped.
    assert_eq!(proxy.client().status_of("GET /v1/models").unwrap(), 403);
    assert_eq!(proxy.stop().status.code(), Some(0));

    let files = files(&dumping.dumps());
    let [[one, at, _], [_, same, _], [two, later, _], _] = [0, 1, 2, 3].map(|n| parts(&files[n]));
    assert_eq!((files.len(), &*one, &*two), (4, "000001", "000002"));
    assert_eq!(at, same, "both names have the time of the request");
    let milliseconds = |text: String| text.parse::<u64>().unwrap();
    let (at, later) = (milliseconds(at), milliseconds(later));
    assert!(at > 1_700_000_000_000 && at <= later);
    for pair in files.chunks(2) {
        assert_eq!((mode(&pair[0]), mode(&pair[1])), (0o600, 0o600));
        let kinds = [0, 1].map(|n| parts(&pair[n])[2].clone());
        assert_eq!(kinds, ["request", "response"]);
        let (request, response) = (json_of(&pair[0]), json_of(&pair[1]));
        assert_eq!(request["method"], "POST");
        assert!(request["url"].as_str().unwrap().ends_with("/v1/responses"));
        assert_eq!(request["body"], json!({"input": "hello"}));
        assert_eq!(header(&request, "x-twice"), ["a", "b"]);
        assert_eq!(header(&request, "content-length"), ["18"]);
        assert_eq!(header(&request, "authorization"), ["[REDACTED]"; 2]);
        assert!(!request.to_string().contains("of-client"));
        assert_eq!(response["status"], 429);
        assert_eq!(response["body"], json!({"error": [1.5, null]}));
        assert_eq!(header(&response, "x-twice"), ["1", "2"]);
        assert_eq!(header(&response, "retry-after"), ["7"]);
    }
}

#[test]
fn json_bodies_are_dumped_as_json_and_others_as_text() {
    // The unit tests of `exchange::dump` have more cases.
    let cases: [(&[u8], Value); 5] = [
        (b" {\"a\": [1, \"\\u00e9\"]}\n", json!({"a": [1, "é"]})),
        (b"17", json!(17)),
        (b"{\"a\": ", json!("{\"a\": ")),
        (b"{}{}", json!("{}{}")),
        (b"{\"a\": \"\xff\"}", json!({"a": "\u{fffd}"})),
    ];
    let dumping = Dumping::new(echo);
    let proxy = dumping.command().start();
    let mut client = proxy.client();
    for (body, expected) in &cases {
        let response = client.post("", body).unwrap();
        assert_eq!(&response.body, body, "{expected}");
    }
    drop(client);
    proxy.stop();
    let both = |(_, expected)| [Value::clone(&expected), expected];
    let expected: Vec<_> = cases.into_iter().flat_map(both).collect();
    assert_eq!(dumping.bodies(), expected);
}

#[test]
fn truncated_responses_are_dumped_up_to_the_failure() {
    let (release, released) = channel();
    let (notify, disconnected) = channel();
    let dumping = Dumping::new(move |request| {
        let fails = request.read_body()? == b"upstream fails";
        request.start_events()?;
        request.chunk("data: 1\n\n")?;
        if fails {
            released.recv()?;
            return request.close_abruptly();
        }
        notify.send(request.wait_until_closed().is_ok()).unwrap();
        Ok(())
    });
    let proxy = dumping.command().start();
    for body in ["upstream fails", "client disconnects"] {
        let mut client = proxy.client();
        client.send_post("", body).unwrap();
        client.read_head().unwrap();
        client.read_part().unwrap();
        if body == "upstream fails" {
            release.send(()).unwrap();
            client.read_rest().unwrap_err();
            continue;
        }
        drop(client);
        assert!(disconnected.recv_timeout(PROMPT).unwrap());
    }
    proxy.stop();
    let event = "data: 1\n\n";
    let expected = ["upstream fails", event, "client disconnects", event];
    assert_eq!(dumping.bodies(), expected);
}

#[test]
fn rejects_unsafe_and_unusable_dump_directories() {
    let dir = TestDir::new();
    fs::write(dir.join("file"), "").unwrap();
    let with_mode = |mode| {
        let path = dir.join(format!("{mode:o}"));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    };
    let mut paths = vec![dir.join("file"), dir.join("file/dumps")];
    paths.extend([0o755, 0o704, 0o720].map(with_mode));
    if require_root("a directory of another user") {
        let foreign = with_mode(0o700);
        chown(&foreign, Some(65534), None).unwrap();
        paths.push(foreign);
    }
    for path in paths {
        let command = ProxyCommand::without_key().arg("--dump-dir").arg(&path);
        let path = path.to_str().unwrap();
        command.assert_startup_error(path, 1, &["--dump-dir", path]);
    }
}

#[test]
fn no_files_are_written_without_the_flag() {
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let command = ProxyCommand::for_upstream(&upstream).env("TMPDIR", &*dir);
    let proxy = command.current_dir(&dir).start();
    assert_eq!(proxy.post_default().status(), 200);
    proxy.stop();
    assert_eq!(files(&dir), [""; 0].map(PathBuf::from));
}

/// Waits for the two log lines about dumps of this request that could not be written.
fn wait_for_write_errors(proxy: &mut Proxy, number: &str) {
    // Both files are written concurrently, so the order varies.
    let lines = [(); 2].map(|()| proxy.wait_for_line(|line| line.contains("cannot write")));
    for kind in ["-request.json", "-response.json"] {
        let matches = |line: &String| line.contains(kind) && line.contains(&format!("/{number}-"));
        assert!(lines.iter().any(matches), "{kind}: {lines:?}");
    }
}

#[test]
fn missing_directory_affects_no_request_and_is_logged() {
    let dumping = Dumping::new(ok);
    let (dumps, moved) = (dumping.dumps(), dumping.dir.join("moved"));
    let mut proxy = dumping.command().start();
    let mut client = proxy.client();
    fs::rename(&dumps, &moved).unwrap();
    for number in ["000001", "000002"] {
        assert_eq!(client.post_default().unwrap().status(), 200);
        wait_for_write_errors(&mut proxy, number);
        // In the second round, the path is a file.
        fs::write(&dumps, "").unwrap();
    }
    fs::remove_file(&dumps).unwrap();
    fs::rename(moved, &dumps).unwrap();
    assert_eq!(client.post_default().unwrap().status(), 200);
    proxy.stop();
    assert_eq!(numbers(&dumps), ["000003"; 2]);
}

#[cfg(target_os = "linux")]
mod limits {
    use super::*;

    #[test]
    fn full_disk_affects_no_request_and_is_logged() {
        let dumping = Dumping::new(echo);
        let dumps = dumping.dumps();
        fs::create_dir_all(&dumps).unwrap();
        let disk = Mount::Empty(dumps.clone(), "size=256k,mode=0700");
        let proxy = start_with_mounts("a full disk", dumping.command(), vec![disk]);
        let Some(mut proxy) = proxy else { return };
        let mut client = proxy.client();
        let large = vec![b'x'; 1 << 20];
        // Partial files are removed, so the next dump fits.
        let bodies = [&*large, b"small", &large];
        for (number, body) in ["000001", "000002", "000003"].into_iter().zip(bodies) {
            assert_eq!(client.post("", body).unwrap().body, body);
            if body == large {
                wait_for_write_errors(&mut proxy, number);
            }
        }
        let inside = format!("/proc/{}/root{}", proxy.pid(), dumps.display());
        assert_eq!(numbers(inside.as_ref()), ["000002"; 2]);
    }

    #[test]
    fn long_bodies_are_truncated_and_marked() {
        const MAX_BODY: usize = 16 << 20;
        let dumping = Dumping::new(|request| {
            request.read_body()?;
            request.respond_with_events(&[&*"x".repeat(1 << 20); 20])
        });
        let proxy = dumping.command().start();
        let body = proxy.client().post("", "long").unwrap().body;
        assert_eq!(body.len(), 20 << 20);
        proxy.stop();
        for (path, long) in files(&dumping.dumps()).iter().zip([false, true]) {
            let dump: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
            let length = if long { MAX_BODY } else { 4 };
            assert_eq!(dump["body"].as_str().unwrap().len(), length, "{path:?}");
            assert_eq!(dump["truncated"] == true, long, "{path:?}");
        }
    }

    #[test]
    fn full_dump_buffer_skips_dumps_and_affects_no_request() {
        const STREAMS: usize = 6;
        const LENGTH: usize = 15 << 20;
        let (notify, sent) = channel();
        let (release, released) = channel();
        let dumping = Dumping::new(move |request| {
            request.read_body()?;
            request.start_events()?;
            request.chunk(vec![b'x'; LENGTH])?;
            notify.send(()).unwrap();
            released.recv()?;
            request.chunk("")
        });
        let mut proxy = dumping.command().start();
        let clients = [(); STREAMS].map(|()| {
            let mut client = proxy.client();
            std::thread::spawn(move || client.post_default().unwrap().body.len())
        });
        // Six responses of 15 MiB are buffered until they end, which is more than the limit of 64 MiB.
        (0..STREAMS).for_each(|_| sent.recv().unwrap());
        proxy.wait_for_line(|line| line.contains("is not written: dump buffer full"));
        (0..STREAMS).for_each(|_| release.send(()).unwrap());
        for client in clients {
            assert_eq!(client.join().unwrap(), LENGTH);
        }
        proxy.stop();
        let count = files(&dumping.dumps()).len();
        assert!((STREAMS..2 * STREAMS).contains(&count), "{count}");
    }
}
