//! `--allow-user` serves only these users, and no user can pass for another by disconnecting.

mod support;

#[cfg(not(target_os = "linux"))]
#[test]
fn allow_user_is_a_startup_error_outside_linux() {
    let command = support::ProxyCommand::new().args(["--allow-user", "0"]);
    command.assert_startup_error("not Linux", 1, &["--allow-user"]);
    let what = "key_in_memory, loopback, overload, privileges, process_isolation, upstream_owner, most of allow_user, and \
                parts of dump and logging";
    support::skip(what, "requires Linux");
}

#[cfg(target_os = "linux")]
mod linux {
    use super::support::*;
    use nix::{libc, sys::signal::Signal};
    use std::{fs, io, path::Path};

    /// Two UIDs without names, and the unprivileged UID of every system.
    const ALLOWED: u32 = 3_900_001;
    const DENIED: u32 = 3_900_002;
    const NOBODY: u32 = 65_534;

    /// The proxy with `--allow-user` for each of these users.
    fn allowing<'a>(upstream: &Upstream, users: impl IntoIterator<Item = &'a str>) -> ProxyCommand {
        let args = users.into_iter().flat_map(|user| ["--allow-user", user]);
        ProxyCommand::for_upstream(upstream).args(args)
    }

    /// A connection of this user. A socket belongs to the user that created it, even if another one uses it.
    fn client_of(uid: u32, proxy: &Proxy) -> Client {
        let port = proxy.port;
        as_user(uid, || Client::connect(port))
    }

    fn status_for(proxy: &Proxy, uid: u32) -> u16 {
        client_of(uid, proxy).post_default().unwrap().status()
    }

    #[test]
    fn allowed_users_are_served_and_each_uid_is_logged() {
        if !require_root("clients of several users") {
            return;
        }
        let upstream = Upstream::start(ok);
        let allowed = ALLOWED.to_string();
        let command = allowing(&upstream, [&*allowed, "root"]).arg("--http-shutdown");
        let mut proxy = command.start();
        for (uid, status, line) in [
            (ALLOWED, 200, "request "),
            (0, 200, "request "),
            (DENIED, 403, "refused "),
            (NOBODY, 403, "refused "),
            (ALLOWED, 200, "request "),
        ] {
            assert_eq!(status_for(&proxy, uid), status, "{uid}");
            let words = [format!(" uid={uid} "), format!(" status={status} ")];
            proxy.wait_for_request(line, &[&words[0], &words[1]]);
        }
        let mut client = client_of(ALLOWED, &proxy);
        assert_eq!(client.status_of("GET /shutdown").unwrap(), 200);
        let run = proxy.wait();
        assert_eq!(run.status.code(), Some(0), "{run:?}");
        assert_eq!(bodies(upstream), [b"{}"; 3]);
    }

    #[test]
    fn denied_user_gets_403_on_every_path_and_is_disconnected() {
        if !require_root("clients of several users") {
            return;
        }
        let upstream = Upstream::start(ok);
        let command = allowing(&upstream, [&*ALLOWED.to_string()]);
        let command = command.args(["--http-shutdown", "--websocket"]);
        let proxy = command.start();
        let requests = "POST /v1/responses|a handshake|GET /shutdown|GET /v1/models|POST /v1/responses?|OPTIONS *|DELETE /";
        for request in requests.split('|') {
            let mut client = client_of(DENIED, &proxy);
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
            assert_eq!(client.read_until_closed().unwrap(), b"", "{request}");
        }
        // The denied `GET /shutdown` had no effect.
        assert_eq!(status_for(&proxy, ALLOWED), 200);
        let run = proxy.stop();
        assert_eq!(run.status.code(), Some(0), "{run:?}");
        let is_denied = |line: &&String| line.contains(&format!("uid={DENIED} "));
        let lines = run.stderr.iter().filter(is_denied).count();
        let expected = requests.split('|').count();
        assert_eq!(lines, expected, "one line each: {run:?}");
        assert_eq!(bodies(upstream), [b"{}"]);
    }

    fn bodies(upstream: Upstream) -> Vec<Vec<u8>> {
        let requests = upstream.into_requests().into_iter();
        requests.map(|request| request.body).collect()
    }

    #[test]
    fn denied_users_take_no_slots_from_others() {
        if !require_root("a client of another user") {
            return;
        }
        let upstream = Upstream::start(ok);
        // A limit of 30 clients.
        let command = limit_descriptors(allowing(&upstream, [&*ALLOWED.to_string()]), 100, 0..0);
        let proxy = command.start();
        // Half of them send a partial request. They never read.
        let mut denied = [(); 100].map(|()| client_of(DENIED, &proxy));
        for client in denied.iter_mut().step_by(2) {
            let _ = client.send("POST /v1/resp");
        }
        for _ in 0..40 {
            assert_eq!(status_for(&proxy, ALLOWED), 200);
        }
        drop(denied);
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
        wait_until("the slots are free", || status_for(&proxy, ALLOWED) == 200);
    }

    #[test]
    fn denied_user_passes_for_no_other_by_disconnecting() {
        const EACH: usize = 60;
        if !require_root("clients of another user that disconnect") {
            return;
        }
        let upstream = Upstream::start(ok);
        // The kernel reports UID 0 for a socket that is closed.
        let command = allowing(&upstream, ["root"]).arg("--http-shutdown");
        let proxy = command.start();
        let disconnects = "closes|resets|half closes|half closes, then closes";
        let mut staying = Vec::new();
        // In the first round, all clients have disconnected before the proxy accepts one. In the second, both race.
        for frozen in [true, false] {
            if frozen {
                proxy.freeze();
            }
            for number in 0..EACH {
                for disconnect in disconnects.split('|') {
                    let mut client = client_of(DENIED, &proxy);
                    let shutdown = "GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n";
                    let post = client.post_head("Content-Length: 2\r\n") + "{}";
                    client.send([shutdown, &post][number % 2]).unwrap();
                    if disconnect.starts_with("half") {
                        client.shutdown_write();
                    }
                    match disconnect {
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
        let is_root = |line: &&String| line.starts_with("request uid=0 status=200");
        let (of_root, others): (Vec<_>, Vec<_>) = lines.partition(is_root);
        assert_eq!(of_root.len(), 2, "requests of root");
        for line in others {
            let line = line.replace(&format!("uid={DENIED} "), "uid=- ");
            assert!(line.starts_with("refused uid=- status=403 "), "{line}");
        }
        assert_eq!(upstream.into_requests().len(), 2, "requests of root");
    }

    #[test]
    fn allowed_user_who_half_closes_early_is_denied() {
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
    fn names_and_groups_are_served_and_changes_take_effect() {
        let what = "users and groups by name";
        if Path::new("/var/run/nscd/socket").exists() {
            return skip(what, "nscd serves /etc/passwd here");
        }
        let dir = TestDir::new();
        let file = |name: &str, content: &str| {
            fs::write(dir.join(name), content).unwrap();
            Mount::File(dir.join(name), Path::new("/etc").join(name))
        };
        let both = "primary:x:3900200:\ndevelopers:x:3900201:root,bob\n";
        let others = "developers:x:3900201:dave\nprimary:x:3900202:\n";
        // The groups, and the expected statuses for alice (by name), bob, carol, dave and a user without a name.
        let stages = [
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
        for (groups, expected) in stages {
            // In place: the mount refers to the file, not to its name.
            fs::write(dir.join("group"), format!("root:x:0:\n{groups}")).unwrap();
            let users = [3_900_101, 3_900_102, 3_900_103, 3_900_104, DENIED];
            // Group memberships are cached for a moment.
            let statuses = || users.map(|uid| status_for(&proxy, uid));
            wait_until(groups, || statuses() == expected);
        }
    }

    /// Denies netlink sockets to a program with a seccomp filter, like systemd's `RestrictAddressFamilies=`.
    fn without_netlink(command: ProxyCommand) -> ProxyCommand {
        const DENIED: u32 = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
        // Offset of the number of the system call: 0. Of the lower half of its first argument: 16 or 20 (linux/seccomp.h).
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
            // SAFETY: `program` describes a filter that outlives the call. The other arguments are integers.
            #[allow(unsafe_code)]
            match unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }

    #[test]
    fn allow_user_without_netlink_is_a_startup_error() {
        let upstream = Upstream::start(ok);
        let words = ["--allow-user", "AF_NETLINK"];
        without_netlink(allowing(&upstream, ["0"])).assert_startup_error("denied", 1, &words);
        // Without the flag, netlink is not needed.
        let proxy = without_netlink(ProxyCommand::for_upstream(&upstream)).start();
        assert_eq!(proxy.post_default().status(), 200);
    }

    #[test]
    fn owner_check_without_netlink_is_skipped_unless_requested() {
        let plain = Upstream::start_plain(ok);
        let proxy = without_netlink(ProxyCommand::for_upstream(&plain)).start();
        let is_logged = |line: &&String| line.contains("owner is not checked");
        assert_eq!(proxy.log.iter().filter(is_logged).count(), 1);
        assert_eq!(proxy.post_default().status(), 200);
        let command = ProxyCommand::for_upstream(&plain).args(["--upstream-user", "0"]);
        let words = ["--upstream-user", "AF_NETLINK"];
        without_netlink(command).assert_startup_error("denied", 1, &words);
    }

    #[test]
    fn unknown_users_and_groups_are_startup_errors() {
        for name in "no-such-user-here @no-such-group-here 4294967296 -1 @ ".split(' ') {
            let command = ProxyCommand::new().args(["--allow-user", "0"]);
            let command = command.arg(format!("--allow-user={name}"));
            command.assert_startup_error(name, 1, &["--allow-user", name]);
        }
    }
}
