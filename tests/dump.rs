//! What `--dump-dir` writes: whole exchanges without the keys, for their owner's eyes, and never at the exchange's
//! expense: a full disk, a long answer or few descriptors cost the dump.

mod support;

use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use support::*;

/// The files of a directory, in the order of their names.
fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// A proxy that dumps, and what it needs for as long as it runs.
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

    /// The bodies in its files, in the order of their names.
    fn bodies(&self) -> Vec<Value> {
        let files = files(&self.dumps()).into_iter();
        files.map(|file| json_of(&file)["body"].take()).collect()
    }
}

/// The numbers in the names of these files.
fn numbers(dir: &Path) -> Vec<String> {
    let number = |file: &PathBuf| parts(file)[0].clone();
    files(dir).iter().map(number).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// Number, milliseconds and kind of a file.
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

/// The values of a header in a dump, in order.
fn header<'a>(dump: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = dump["headers"].as_array().unwrap().iter();
    let of_name = headers.filter(|header| header["name"] == name);
    let value = |header: &'a Value| header["value"].as_str().unwrap();
    of_name.map(value).collect()
}

#[test]
fn each_exchange_is_two_files_for_their_owner_alone() {
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
        let headers = "X-Twice: a\r\nAuthorization: Bearer sk-their-own\r\nx-twice: b\r\n\
            AUTHORIZATION: Basic c2stdGhlaXItb3du\r\n";
        let body = "{\"input\": \"hello\"}";
        let response = proxy.client().post(headers, body).unwrap();
        assert_eq!(response.status(), 429);
    }
    // What is refused is no exchange.
    assert_eq!(proxy.client().status_of("GET /v1/models").unwrap(), 403);
    assert_eq!(proxy.stop().status.code(), Some(0));

    let files = files(&dumping.dumps());
    let [[one, at, _], [_, same, _], [two, later, _], _] = [0, 1, 2, 3].map(|n| parts(&files[n]));
    assert_eq!((files.len(), &*one, &*two), (4, "000001", "000002"));
    assert_eq!(at, same, "both have the time of the request");
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
        assert!(!request.to_string().contains("their-own"));
        assert_eq!(response["status"], 429);
        assert_eq!(response["body"], json!({"error": [1.5, null]}));
        assert_eq!(header(&response, "x-twice"), ["1", "2"]);
        assert_eq!(header(&response, "retry-after"), ["7"]);
    }
}

#[test]
fn a_body_is_json_where_it_is_that_and_text_where_it_is_not() {
    // The module that writes them has more.
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
fn what_breaks_off_is_dumped_as_far_as_it_came() {
    let (release, released) = channel();
    let (tell, told) = channel();
    let dumping = Dumping::new(move |request| {
        let breaks = request.read_body()? == b"breaks";
        request.start_events()?;
        request.chunk("data: 1\n\n")?;
        if breaks {
            released.recv()?;
            return request.close_abruptly();
        }
        tell.send(request.wait_until_closed().is_ok()).unwrap();
        Ok(())
    });
    let proxy = dumping.command().start();
    for body in ["breaks", "leaves"] {
        let mut client = proxy.client();
        client.send_post("", body).unwrap();
        client.read_head().unwrap();
        client.read_part().unwrap();
        if body == "breaks" {
            release.send(()).unwrap();
            client.read_rest().unwrap_err();
            continue;
        }
        drop(client);
        assert!(told.recv_timeout(PROMPT).unwrap());
    }
    proxy.stop();
    let expected = ["breaks", "data: 1\n\n", "leaves", "data: 1\n\n"];
    assert_eq!(dumping.bodies(), expected);
}

#[test]
fn a_folder_that_others_may_enter_or_that_cannot_be_made_is_one_sentence() {
    let dir = TestDir::new();
    fs::write(dir.join("file"), "").unwrap();
    let open = |mode| {
        let path = dir.join(format!("{mode:o}"));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    };
    let mut paths = vec![dir.join("file"), dir.join("file/dumps")];
    paths.extend([0o755, 0o704, 0o720].map(open));
    if require_root("a dir that is somebody else's") {
        let strangers = open(0o700);
        chown(&strangers, Some(65534), None).unwrap();
        paths.push(strangers);
    }
    for path in paths {
        let command = ProxyCommand::without_key().arg("--dump-dir").arg(&path);
        let path = path.to_str().unwrap();
        command.assert_startup_error(path, 1, &["--dump-dir", path]);
    }
}

#[test]
fn nothing_is_written_unless_asked_for() {
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let command = ProxyCommand::for_upstream(&upstream).env("TMPDIR", &*dir);
    let proxy = command.current_dir(&dir).start();
    assert_eq!(proxy.post_default().status(), 200);
    proxy.stop();
    assert_eq!(files(&dir), [""; 0].map(PathBuf::from));
}

/// The log says of the exchange with this number that it could not be dumped.
fn wait_for_complaints(proxy: &mut Proxy, number: &str) {
    // Both at once, so in any order.
    let lines = [(); 2].map(|()| proxy.wait_for_line(|line| line.contains("cannot write")));
    for kind in ["-request.json", "-response.json"] {
        let is_of = |line: &String| line.contains(kind) && line.contains(&format!("/{number}-"));
        assert!(lines.iter().any(is_of), "{kind}: {lines:?}");
    }
}

#[test]
fn a_folder_that_goes_away_harms_no_exchange_and_is_logged() {
    let dumping = Dumping::new(ok);
    let (dumps, elsewhere) = (dumping.dumps(), dumping.dir.join("elsewhere"));
    let mut proxy = dumping.command().start();
    let mut client = proxy.client();
    fs::rename(&dumps, &elsewhere).unwrap();
    for number in ["000001", "000002"] {
        assert_eq!(client.post_default().unwrap().status(), 200, "gone");
        wait_for_complaints(&mut proxy, number);
        // From now on, there is a file in its place.
        fs::write(&dumps, "").unwrap();
    }
    fs::remove_file(&dumps).unwrap();
    fs::rename(elsewhere, &dumps).unwrap();
    assert_eq!(client.post_default().unwrap().status(), 200);
    proxy.stop();
    assert_eq!(numbers(&dumps), ["000003"; 2]);
}

#[cfg(target_os = "linux")]
mod little_room {
    use super::*;

    #[test]
    fn a_full_disk_harms_no_exchange_and_is_logged() {
        let dumping = Dumping::new(echo);
        let dumps = dumping.dumps();
        fs::create_dir_all(&dumps).unwrap();
        let disk = Mount::Empty(dumps.clone(), "size=256k,mode=0700");
        let proxy = start_with_mounts("a full disk", dumping.command(), vec![disk]);
        let Some(mut proxy) = proxy else { return };
        let mut client = proxy.client();
        let large = vec![b'x'; 1 << 20];
        // What couldn't be written takes no room either, so the next one can be.
        let bodies = [&*large, b"small", &large];
        for (number, body) in ["000001", "000002", "000003"].into_iter().zip(bodies) {
            assert_eq!(client.post("", body).unwrap().body, body);
            if body == large {
                wait_for_complaints(&mut proxy, number);
            }
        }
        let inside = format!("/proc/{}/root{}", proxy.pid(), dumps.display());
        assert_eq!(numbers(inside.as_ref()), ["000002"; 2]);
    }

    #[test]
    fn a_long_body_is_cut_off_and_its_file_says_so() {
        const LONGEST: usize = 16 << 20;
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
            let length = if long { LONGEST } else { 4 };
            assert_eq!(dump["body"].as_str().unwrap().len(), length, "{path:?}");
            assert_eq!(dump["truncated"] == true, long, "{path:?}");
        }
    }

    #[test]
    fn what_is_too_much_together_is_not_dumped_and_harms_no_exchange() {
        const STREAMS: usize = 6;
        const LENGTH: usize = 15 << 20;
        let (tell, told) = channel();
        let (release, released) = channel();
        let dumping = Dumping::new(move |request| {
            request.read_body()?;
            request.start_events()?;
            request.chunk(vec![b'x'; LENGTH])?;
            tell.send(()).unwrap();
            released.recv()?;
            request.chunk("")
        });
        let mut proxy = dumping.command().start();
        let clients = [(); STREAMS].map(|()| {
            let mut client = proxy.client();
            std::thread::spawn(move || client.post_default().unwrap().body.len())
        });
        // All six wait for their end with 15 MiB each, of which four have room together.
        (0..STREAMS).for_each(|_| told.recv().unwrap());
        proxy.wait_for_line(|line| line.contains("is not written: dump buffer full"));
        (0..STREAMS).for_each(|_| release.send(()).unwrap());
        for client in clients {
            assert_eq!(client.join().unwrap(), LENGTH);
        }
        proxy.stop();
        let there = files(&dumping.dumps()).len();
        assert!((STREAMS..2 * STREAMS).contains(&there), "{there}");
    }
}
