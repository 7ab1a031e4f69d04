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
        linux::{Mount, limit_descriptors, with_mounts},
        proxy::{Launch, Proxy},
        skip,
        upstream::Upstream,
    };
    use serde_json::Value;
    use std::{
        fs,
        path::{Path, PathBuf},
        sync::{Mutex, mpsc},
        thread,
        time::Duration,
    };

    const MIB: usize = 1 << 20;

    fn dumping(upstream: &Upstream, folder: &Path) -> Launch {
        Launch::to(upstream).arg("--dump-dir").arg(folder)
    }

    /// Waits until neither file of an exchange could be written, in whichever order.
    fn wait_for_complaints(proxy: &mut Proxy, exchange: &str) {
        let mut kinds = vec!["-request.json", "-response.json"];
        proxy.wait_for_line(|line| {
            let is_this = line.contains("cannot write") && line.contains(exchange);
            kinds.retain(|kind| !(is_this && line.contains(kind)));
            kinds.is_empty()
        });
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
        wait_for_complaints(&mut proxy, "/000001-");
        // What couldn't be written takes no room either, so the next one can be.
        client.post("", b"small").unwrap();
        assert_eq!(client.response().unwrap().body, b"small");
        client.post("", &large).unwrap();
        assert_eq!(client.response().unwrap().body, large);
        wait_for_complaints(&mut proxy, "/000003-");
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
    fn a_long_body_is_cut_off_and_its_file_says_so() {
        const LONGEST: usize = 16 * MIB;
        let upstream = Upstream::start(|exchange| {
            exchange.begin_events()?;
            let piece = "x".repeat(MIB);
            for _ in 0..20 {
                exchange.chunk(&piece)?;
            }
            exchange.chunk("")
        });
        let folder = Folder::new();
        let dumps = folder.join("dumps");
        let proxy = dumping(&upstream, &dumps).start();
        let mut client = Client::connect(proxy.port);
        client.post("", b"long").unwrap();
        assert_eq!(client.response().unwrap().body.len(), 20 * MIB);
        proxy.stop();
        for entry in fs::read_dir(&dumps).unwrap() {
            let path = entry.unwrap().path();
            let dump: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
            let is_answer = path.to_str().unwrap().ends_with("-response.json");
            let expected = if is_answer { LONGEST } else { 4 };
            assert_eq!(dump["body"].as_str().unwrap().len(), expected);
            assert_eq!(dump["truncated"] == true, is_answer);
        }
    }

    #[test]
    fn what_is_too_much_together_is_not_dumped_and_harms_no_exchange() {
        const STREAMS: usize = 6;
        let (report, reports) = mpsc::channel();
        let (go_on, held) = mpsc::channel::<()>();
        let held = Mutex::new(held);
        let upstream = Upstream::start(move |exchange| {
            exchange.body()?;
            exchange.begin_events()?;
            let piece = "x".repeat(MIB);
            for _ in 0..15 {
                exchange.chunk(&piece)?;
            }
            report.send(()).unwrap();
            held.lock().unwrap().recv_timeout(PATIENCE).unwrap();
            exchange.chunk("")
        });
        let folder = Folder::new();
        let mut proxy = dumping(&upstream, &folder.join("dumps")).start();
        let clients: Vec<_> = (0..STREAMS)
            .map(|_| {
                let mut client = Client::connect(proxy.port);
                client.post("", b"{}").unwrap();
                thread::spawn(move || client.response().unwrap().body.len())
            })
            .collect();
        // All six are open with 15 MiB each, of which four have room together.
        (0..STREAMS).for_each(|_| reports.recv_timeout(PATIENCE).unwrap());
        proxy.wait_for_line(|line| line.contains("is not written: too much is waiting"));
        (0..STREAMS).for_each(|_| go_on.send(()).unwrap());
        for client in clients {
            assert_eq!(client.join().unwrap(), 15 * MIB);
        }
        proxy.stop();
        let files = fs::read_dir(folder.join("dumps")).unwrap().count();
        assert!((STREAMS..2 * STREAMS).contains(&files), "{files}");
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
