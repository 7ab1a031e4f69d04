//! Dumps take what is left over: a full disk, a long answer or few descriptors cost the dump and not the exchange.

mod support;

#[cfg(not(target_os = "linux"))]
#[test]
fn dumps_take_what_is_left_over() {
    support::skip(
        "dumping with little room",
        "this needs /proc and mounts of Linux",
    );
}

#[cfg(target_os = "linux")]
mod linux {
    use super::support::{
        Folder, PATIENCE,
        client::Client,
        is_root,
        linux::{Mount, limit_descriptors, peak_memory, with_mounts},
        proxy::Launch,
        skip,
        upstream::{Upstream, ok},
    };
    use serde_json::Value;
    use std::{
        fs,
        path::{Path, PathBuf},
        sync::{Mutex, mpsc},
        thread,
        time::{Duration, Instant},
    };

    const MIB: usize = 1 << 20;

    fn dumping(upstream: &Upstream, folder: &Path) -> Launch {
        Launch::to(upstream).arg("--dump-dir").arg(folder)
    }

    #[test]
    fn a_full_disk_harms_no_exchange_and_is_logged() {
        let what = "a full disk";
        if !is_root() {
            return skip(what, "only root can mount one");
        }
        let upstream = Upstream::start(|exchange| {
            let body = exchange.body()?.to_vec();
            exchange.answer("200 OK", "", &body)
        });
        let folder = Folder::new();
        let dumps = folder.join("disk");
        fs::create_dir(&dumps).unwrap();
        let disk = Mount::empty(&dumps, "size=256k,mode=0700");
        let mut proxy = match with_mounts(dumping(&upstream, &dumps), vec![disk]) {
            Ok(launch) => launch.start(),
            Err(error) => return skip(what, &format!("no file system of its own: {error}")),
        };
        let mut client = Client::connect(proxy.port);
        let large = vec![b'x'; MIB];
        client.post("", &large).unwrap();
        assert_eq!(client.response().unwrap().body, large);
        for kind in ["-request.json", "-response.json"] {
            proxy.wait_for_line(|line| line.contains("cannot write") && line.contains(kind));
        }
        // What couldn't be written takes no room either, so the next one can be.
        client.post("", b"small").unwrap();
        assert_eq!(client.response().unwrap().body, b"small");
        client.post("", &large).unwrap();
        assert_eq!(client.response().unwrap().body, large);
        // It is dumped in order, so the second exchange has been.
        proxy.wait_for_line(|line| line.contains("cannot write") && line.contains("/000003-"));
        let inside: PathBuf = format!("/proc/{}/root", proxy.pid()).into();
        let inside = inside.join(dumps.strip_prefix("/").unwrap());
        let mut names: Vec<_> = fs::read_dir(inside)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with("000003"))
            .collect();
        names.sort();
        assert!(
            names.len() == 2 && names.iter().all(|name| name.starts_with("000002")),
            "{names:?}"
        );
    }

    #[test]
    fn a_long_answer_takes_no_memory() {
        const LENGTH: usize = 32 * MIB;
        let upstream = Upstream::start(|exchange| {
            if exchange.body()? != b"long" {
                return ok(exchange);
            }
            // JSON, which has to be looked at as a whole, and a string, which a parser would keep.
            exchange.begin_events()?;
            exchange.chunk("\"")?;
            let piece = "x".repeat(MIB);
            for _ in 0..LENGTH / MIB {
                exchange.chunk(&piece)?;
            }
            exchange.chunk("\"")?;
            exchange.chunk("")
        });
        let folder = Folder::new();
        let dumps = folder.join("dumps");
        let mut proxy = dumping(&upstream, &dumps).start();
        let mut client = Client::connect(proxy.port);
        client.ask().unwrap();
        let before = peak_memory(&proxy);
        client.post("", b"long").unwrap();
        assert_eq!(client.response().unwrap().body.len(), LENGTH + 2);
        // Everything is on the disk when the last of its names is there.
        client.ask().unwrap();
        let is_last = |name: &str| name.starts_with("000003-") && name.ends_with("-response.json");
        let there = || -> Vec<_> {
            fs::read_dir(&dumps)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect()
        };
        let deadline = Instant::now() + 3 * PATIENCE;
        while !there()
            .iter()
            .any(|path| is_last(path.file_name().unwrap().to_str().unwrap()))
        {
            assert!(Instant::now() < deadline, "{:?}", there());
            thread::yield_now();
        }
        let grown = peak_memory(&proxy) - before;
        assert!(grown < 16 * MIB as u64, "{grown} bytes more");
        assert!(proxy.is_running());
        drop(client);
        let run = proxy.stop();
        let long = there().into_iter().find(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.starts_with("000002-") && name.ends_with("-response.json")
        });
        let dump: Value = serde_json::from_slice(&fs::read(long.unwrap()).unwrap()).unwrap();
        let dumped = dump["body"].as_str().unwrap().len();
        let incomplete = run.stderr.iter().any(|line| line.contains("incomplete"));
        assert_eq!(dumped < LENGTH, incomplete, "{dumped}: {run:?}");
    }

    #[test]
    fn few_descriptors_harm_no_exchange() {
        const STREAMS: usize = 28;
        let (report, reports) = mpsc::channel();
        let (go_on, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let upstream = Upstream::start(move |exchange| {
            exchange.body()?;
            exchange.begin_events()?;
            exchange.chunk("data: 1\n\n")?;
            report.send(()).unwrap();
            held.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            exchange.chunk("")
        });
        let folder = Folder::new();
        let launch = dumping(&upstream, &folder.join("dumps"));
        let proxy = limit_descriptors(launch, 80, 0..0).start();
        let mut clients: Vec<_> = (0..STREAMS)
            .map(|_| {
                let mut client = Client::connect(proxy.port);
                client.post("Connection: close\r\n", b"{}").unwrap();
                client
            })
            .collect();
        // As many streams are open at once as it lets in; the others have their turn afterwards.
        let come = std::iter::from_fn(|| reports.recv_timeout(Duration::from_secs(1)).ok());
        assert!(come.take(STREAMS).count() > 0);
        for _ in 0..STREAMS {
            go_on.send(()).unwrap();
        }
        for (number, client) in clients.iter_mut().enumerate() {
            let response = client.response().unwrap();
            assert_eq!(response.status(), 200, "{number}: {response:?}");
            assert_eq!(response.body, b"data: 1\n\n", "{number}");
        }
    }
}
