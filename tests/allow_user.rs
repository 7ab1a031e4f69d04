//! Only the users that were named are served: nobody passes for another one, whatever becomes of their connection.

mod support;

#[cfg(not(target_os = "linux"))]
#[test]
fn it_is_an_error_where_the_kernel_does_not_tell_users_apart() {
    let command = support::ProxyCommand::new().args(["--allow-user", "0"]);
    command.assert_startup_error("not Linux", 1, &["--allow-user"]);
    let what = "key_once, overload, process_privacy and parts of allow_user and dump";
    support::skip(what, "they need what only Linux tells of a process");
}

#[cfg(target_os = "linux")]
mod linux {
    use super::support::*;
    use nix::{libc, sys::signal::Signal};
    use std::{fs, io, path::Path};

    /// Users that no system gives a name to, and the one that every system gives nothing to.
    const ALLOWED: u32 = 3_900_001;
    const REFUSED: u32 = 3_900_002;
    const NOBODY: u32 = 65_534;

    /// The proxy, which serves these.
    fn allowing<'a>(upstream: &Upstream, who: impl IntoIterator<Item = &'a str>) -> ProxyCommand {
        let args = who.into_iter().flat_map(|who| ["--allow-user", who]);
        ProxyCommand::for_upstream(upstream).args(args)
    }

    /// A connection of this user's. A socket is whose it was when it was made, whoever uses it.
    fn client_of(uid: u32, proxy: &Proxy) -> Client {
        let port = proxy.port;
        as_user(uid, || Client::connect(port))
    }

    fn status_for(proxy: &Proxy, uid: u32) -> u16 {
        client_of(uid, proxy).post_default().unwrap().status()
    }

    #[test]
    fn a_named_user_is_served_and_others_are_refused_on_every_path_with_their_uid_in_the_log() {
        if !require_root("clients of several users") {
            return;
        }
        let upstream = Upstream::start(ok);
        let command = allowing(&upstream, [&*ALLOWED.to_string(), "root"]);
        let command = command.args(["--http-shutdown", "--websocket"]);
        let mut proxy = command.start();
        for (uid, status, line) in [
            (ALLOWED, 200, "request "),
            (0, 200, "request "),
            (REFUSED, 403, "refused "),
            (NOBODY, 403, "refused "),
            (ALLOWED, 200, "request "),
        ] {
            assert_eq!(status_for(&proxy, uid), status, "{uid}");
            let words = [format!(" uid={uid} "), format!(" status={status} ")];
            proxy.wait_for_request(line, &[&words[0], &words[1]]);
        }
        assert_eq!(upstream.requests().len(), 3);
        // On no path: neither to get through nor to stop it.
        let requests = "POST /v1/responses|a handshake|GET /shutdown|GET /v1/models|POST /v1/responses?|OPTIONS *|DELETE /";
        for request in requests.split('|') {
            let mut client = client_of(REFUSED, &proxy);
            let headers = "Host: localhost\r\nContent-Length: 2";
            let bytes = match request {
                "a handshake" => handshake(""),
                _ => format!("{request} HTTP/1.1\r\n{headers}\r\n\r\n{{}}"),
            };
            client.send(bytes).unwrap();
            let response = client.read_response().unwrap();
            assert_eq!(response.status(), 403, "{request}: {response:?}");
            let message = response.error_message();
            assert!(message.contains("user"), "{request}: {message}");
            // It has said all that it may.
            assert_eq!(client.read_until_closed().unwrap(), b"", "{request}");
        }
        let mut client = client_of(ALLOWED, &proxy);
        assert_eq!(client.post_default().unwrap().status(), 200);
        assert_eq!(client.status_of("GET /shutdown").unwrap(), 200);
        let run = proxy.wait();
        assert_eq!(run.status.code(), Some(0), "{run:?}");
        let of_refused = |line: &&String| line.contains(&format!("uid={REFUSED} "));
        let lines = run.stderr.iter().filter(of_refused).count();
        let expected = 1 + requests.split('|').count();
        assert_eq!(lines, expected, "one line each: {run:?}");
        let bodies: Vec<_> = upstream
            .requests()
            .into_iter()
            .map(|recorded| recorded.body)
            .collect();
        assert_eq!(bodies, [b"{}"; 4]);
    }

    #[test]
    fn refused_users_keep_no_place_from_others() {
        if !require_root("a client of another user") {
            return;
        }
        let upstream = Upstream::start(ok);
        // Room for 30 clients.
        let command = limit_descriptors(allowing(&upstream, [&*ALLOWED.to_string()]), 100, 0..0);
        let proxy = command.start();
        // Some of them begin a request, and none reads.
        let mut refused = [(); 100].map(|()| client_of(REFUSED, &proxy));
        for client in refused.iter_mut().step_by(2) {
            let _ = client.send("POST /v1/resp");
        }
        for _ in 0..40 {
            assert_eq!(status_for(&proxy, ALLOWED), 200);
        }
        drop(refused);
    }

    #[test]
    fn one_user_gets_at_most_half_of_the_slots() {
        if !require_root("clients of several users") {
            return;
        }
        let upstream = Upstream::start(ok);
        let users = [ALLOWED, NOBODY].map(|uid| uid.to_string());
        let command = allowing(&upstream, users.iter().map(String::as_str));
        // 30 slots.
        let mut proxy = limit_descriptors(command, 100, 0..0).start();
        let mut clients = [(); 15].map(|()| client_of(ALLOWED, &proxy));
        for client in &mut clients {
            assert_eq!(client.post_default().unwrap().status(), 200);
        }
        for _ in 0..20 {
            let response = client_of(ALLOWED, &proxy).post_default().unwrap();
            assert_eq!(response.status(), 503);
            assert!(response.error_message().contains("half"));
        }
        let uid = format!("uid={ALLOWED} ");
        let is_logged = |line: &str| line.starts_with("refused ") && line.contains(&uid);
        let line = proxy.wait_for_line(is_logged);
        assert!(line.contains(" status=503 "), "{line}");
        assert_eq!(status_for(&proxy, NOBODY), 200);
        assert_eq!(clients[0].post_default().unwrap().status(), 200);
        drop(clients);
        wait_until("its slots are free", || status_for(&proxy, ALLOWED) == 200);
    }

    #[test]
    fn a_refused_user_passes_for_nobody_else_by_leaving() {
        const EACH: usize = 60;
        if !require_root("clients of another user that leave") {
            return;
        }
        let upstream = Upstream::start(ok);
        // A socket that nobody owns any more says that it is root's.
        let command = allowing(&upstream, ["root"]).arg("--http-shutdown");
        let proxy = command.start();
        let ways = "closes|resets|half closes|half closes, then closes";
        let mut staying = Vec::new();
        // All of them have left before the proxy looks at the first; then, whatever comes first.
        for frozen in [true, false] {
            if frozen {
                proxy.freeze();
            }
            for number in 0..EACH {
                for way in ways.split('|') {
                    let mut client = client_of(REFUSED, &proxy);
                    let shutdown = "GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n";
                    let post = client.post_head("Content-Length: 2\r\n") + "{}";
                    client.send([shutdown, &post][number % 2]).unwrap();
                    if way.starts_with("half") {
                        client.shutdown_write();
                    }
                    match way {
                        "resets" => client.reset(),
                        "half closes" => staying.push(client),
                        _ => drop(client),
                    }
                }
            }
            proxy.signal(Signal::SIGCONT);
            assert_eq!(status_for(&proxy, 0), 200, "frozen: {frozen}");
        }
        let run = proxy.stop();
        assert_eq!(run.status.code(), Some(0), "{run:?}");
        let lines = run.stderr.iter().filter(|line| line.contains("uid="));
        let is_roots = |line: &&String| line.starts_with("request uid=0 status=200");
        let (roots, others): (Vec<_>, Vec<_>) = lines.partition(is_roots);
        assert_eq!(roots.len(), 2, "root's own");
        for line in others {
            let line = line.replace(&format!("uid={REFUSED} "), "uid=- ");
            assert!(line.starts_with("refused uid=- status=403 "), "{line}");
        }
        assert_eq!(upstream.into_requests().len(), 2, "root's own");
    }

    #[test]
    fn an_allowed_user_who_half_closes_is_not_taken_on_trust() {
        if !require_root("a client of another user") {
            return;
        }
        let upstream = Upstream::start(ok);
        let proxy = allowing(&upstream, [&*ALLOWED.to_string()]).start();
        proxy.freeze();
        let mut client = client_of(ALLOWED, &proxy);
        client.send_post("", "{}").unwrap();
        client.shutdown_write();
        proxy.signal(Signal::SIGCONT);
        assert_eq!(client.read_response().unwrap().status(), 403);
        assert_eq!(status_for(&proxy, ALLOWED), 200);
        proxy.stop();
        assert_eq!(upstream.into_requests().len(), 1);
    }

    const USERS: &str = "root:x:0:0::/:/bin/sh
alice:x:3900101:3900101::/:/bin/sh
bob:x:3900102:3900102::/:/bin/sh
carol:x:3900103:3900200::/:/bin/sh
dave:x:3900104:3900104::/:/bin/sh
";

    #[test]
    fn names_and_groups_are_served_and_a_changed_membership_counts_soon() {
        let what = "users and groups by name";
        if Path::new("/var/run/nscd/socket").exists() {
            return skip(what, "a daemon answers for /etc/passwd here");
        }
        let dir = TestDir::new();
        let file = |name: &str, content: &str| {
            fs::write(dir.join(name), content).unwrap();
            Mount::File(dir.join(name), Path::new("/etc").join(name))
        };
        let both = "primary:x:3900200:\ndevelopers:x:3900201:root,bob\n";
        let others = "developers:x:3900201:dave\nprimary:x:3900202:\n";
        // Each time: the groups, and who is served then: alice by name, bob, carol, dave, and one without a name.
        let times = [
            (both, [200, 200, 200, 403, 403]),
            (others, [200, 403, 403, 200, 403]),
            ("", [200, 403, 403, 403, 403]),
        ];
        let files_only = "passwd: files\ngroup: files\n";
        let mounts = vec![
            file("passwd", USERS),
            file("group", both),
            file("nsswitch.conf", files_only),
        ];
        let upstream = Upstream::start(ok);
        let command = allowing(&upstream, ["alice", "@developers", "@primary"]);
        let Some(proxy) = start_with_mounts(what, command, mounts) else {
            return;
        };
        for (groups, expected) in times {
            // In place, for the mount is of the file and not of its name.
            fs::write(dir.join("group"), format!("root:x:0:\n{groups}")).unwrap();
            let users = [3_900_101, 3_900_102, 3_900_103, 3_900_104, REFUSED];
            // What the group database says is relied on for a moment.
            let statuses = || users.map(|uid| status_for(&proxy, uid));
            wait_until(groups, || statuses() == expected);
        }
    }

    /// Denies a program netlink sockets in the way of systemd's `RestrictAddressFamilies=`.
    fn without_netlink(command: ProxyCommand) -> ProxyCommand {
        const DENIED: u32 = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
        // The call's number is at 0, the lower half of its first argument at 16 or 20 (linux/seccomp.h).
        let first_argument = 16 + 4 * u32::from(cfg!(target_endian = "big"));
        let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
        let filter = [
            (load, 0, 0),
            (libc::BPF_JMP | libc::BPF_JEQ, 3, libc::SYS_socket as u32),
            (load, 0, first_argument),
            (libc::BPF_JMP | libc::BPF_JEQ, 1, libc::AF_NETLINK as u32),
            (libc::BPF_RET, 0, DENIED),
            (libc::BPF_RET, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let mut filter = filter.map(|(code, jf, k)| {
            let (code, jt) = (code as u16, 0);
            libc::sock_filter { code, jt, jf, k }
        });
        command.pre_exec(move || {
            let (len, filter) = (filter.len() as u16, filter.as_mut_ptr());
            let program = libc::sock_fprog { len, filter };
            nix::sys::prctl::set_no_new_privs()?;
            let mode = libc::SECCOMP_MODE_FILTER;
            // SAFETY: `program` has a filter of its length, which lives through the call; the others are integers.
            #[allow(unsafe_code)]
            match unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }

    #[test]
    fn without_netlink_it_does_not_start_and_says_what_is_missing() {
        let upstream = Upstream::start(ok);
        let words = ["--allow-user", "AF_NETLINK"];
        without_netlink(allowing(&upstream, ["0"])).assert_startup_error("denied", 1, &words);
        // Who doesn't ask for it doesn't need it.
        let proxy = without_netlink(ProxyCommand::for_upstream(&upstream)).start();
        assert_eq!(proxy.post_default().status(), 200);
        // The owner of a plain upstream is checked where that is possible, and where it was asked for.
        let plain = Upstream::start_plain(ok);
        let proxy = without_netlink(ProxyCommand::for_upstream(&plain)).start();
        let is_said = |line: &&String| line.contains("owner is not checked");
        assert_eq!(proxy.log.iter().filter(is_said).count(), 1);
        assert_eq!(proxy.post_default().status(), 200);
        let command = ProxyCommand::for_upstream(&plain).args(["--upstream-user", "0"]);
        let words = ["--upstream-user", "AF_NETLINK"];
        without_netlink(command).assert_startup_error("denied", 1, &words);
    }

    #[test]
    fn an_unknown_name_is_one_sentence_that_says_which() {
        for name in "no-such-user-here @no-such-group-here 4294967296 -1 @ ".split(' ') {
            let command = ProxyCommand::new().args(["--allow-user", "0"]);
            let command = command.arg(format!("--allow-user={name}"));
            command.assert_startup_error(name, 1, &["--allow-user", name]);
        }
    }
}
