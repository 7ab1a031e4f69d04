//! Only the users that were named are served: nobody passes for another one, whatever becomes of their connection.

mod support;

#[cfg(not(target_os = "linux"))]
#[test]
fn users_are_told_apart() {
    support::skip("clients of several users", "only Linux tells them apart");
}

#[cfg(target_os = "linux")]
mod linux {
    use super::support::{
        Folder, PATIENCE,
        client::Client,
        is_root,
        linux::{Mount, as_user, before_start, checked, with_mounts},
        proxy::{Launch, Proxy},
        skip,
        upstream::{Upstream, ok},
    };
    use std::{
        fs,
        net::Ipv4Addr,
        os::unix::process::CommandExt,
        path::Path,
        process::{Command, Stdio},
        time::Instant,
    };

    /// Users that no system gives a name to, and the one that every system gives nothing to.
    const ALLOWED: u32 = 3_900_001;
    const REFUSED: u32 = 3_900_002;
    const NOBODY: u32 = 65_534;

    /// A connection of this user's. A socket is whose it was when it was made, whoever uses it.
    fn client_of(uid: u32, proxy: &Proxy) -> Client {
        let port = proxy.port;
        as_user(uid, || Client::connect(port))
    }

    /// What the proxy says to a small request of this user.
    fn status_for(proxy: &Proxy, uid: u32) -> u16 {
        client_of(uid, proxy).ask().unwrap().status()
    }

    fn not_root(what: &str) -> bool {
        if !is_root() {
            skip(what, "only root can be another user");
        }
        !is_root()
    }

    #[test]
    fn a_named_user_is_served_and_others_are_refused_with_their_uid_in_the_log() {
        if not_root("clients of several users") {
            return;
        }
        let upstream = Upstream::start(ok);
        let mut proxy = Launch::to(&upstream)
            .args(["--allow-user", &ALLOWED.to_string()])
            .args(["--allow-user", "root"])
            .start();
        for (uid, expected) in [
            (ALLOWED, 200),
            (0, 200),
            (REFUSED, 403),
            (NOBODY, 403),
            (ALLOWED, 200),
        ] {
            assert_eq!(status_for(&proxy, uid), expected, "{uid}");
            let line = proxy.wait_for_line(|line| line.contains("uid="));
            assert!(line.contains(&format!(" uid={uid} ")), "{uid}: {line}");
            assert!(
                line.contains(&format!(" status={expected} ")),
                "{uid}: {line}"
            );
            assert_eq!(line.starts_with("refused "), expected == 403, "{line}");
        }
        assert_eq!(upstream.seen().len(), 3);
    }

    #[test]
    fn a_refused_user_gets_403_on_every_path_and_can_not_stop_it() {
        if not_root("a client of another user") {
            return;
        }
        let upstream = Upstream::start(ok);
        let proxy = Launch::to(&upstream)
            .args(["--allow-user", &ALLOWED.to_string(), "--http-shutdown"])
            .start();
        let requests = [
            "POST /v1/responses",
            "GET /shutdown",
            "GET /v1/models",
            "POST /v1/responses?",
            "OPTIONS *",
            "DELETE /",
        ];
        for request in requests {
            let bytes =
                format!("{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}");
            let mut client = client_of(REFUSED, &proxy);
            client.send(&bytes).unwrap();
            let response = client.response().unwrap();
            assert_eq!(response.status(), 403, "{request}: {response:?}");
            let message = response.error_message();
            assert!(message.contains("user"), "{request}: {message}");
            client.finish_sending();
            assert_eq!(client.until_closed().unwrap(), b"", "{request}");
        }
        let mut client = client_of(ALLOWED, &proxy);
        assert_eq!(client.ask().unwrap().status(), 200);
        client
            .send("GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        assert_eq!(client.response().unwrap().status(), 200);
        let run = proxy.wait();
        assert_eq!(run.status.code(), Some(0), "{run:?}");
        let of_refused = |line: &&String| line.contains(&format!("uid={REFUSED} "));
        let lines = run.stderr.iter().filter(of_refused);
        assert_eq!(lines.count(), requests.len(), "one line each: {run:?}");
        assert_eq!(upstream.only().body, b"{}");
    }

    /// Sends a request from a process of its own that ends at once, its connection still open.
    fn send_and_exit(port: u16, bytes: &[u8]) {
        let bytes = bytes.to_vec();
        let mut command = Command::new("/");
        command.uid(REFUSED).stdin(Stdio::null());
        before_start(&mut command, move || {
            let address = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: port.to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from(Ipv4Addr::LOCALHOST).to_be(),
                },
                sin_zero: [0; 8],
            };
            let size = size_of_val(&address) as libc::socklen_t;
            // SAFETY: `address` is valid and has this size, `bytes` are that many; the others are integers. The
            // process that ends is the child of the fork.
            #[allow(unsafe_code)]
            unsafe {
                let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                checked(socket)?;
                checked(libc::connect(socket, (&raw const address).cast(), size))?;
                let sent = libc::write(socket, bytes.as_ptr().cast(), bytes.len());
                libc::_exit(if sent == bytes.len() as isize { 0 } else { 1 });
            }
        });
        let status = command.status().unwrap();
        assert_eq!(status.code(), Some(0), "{status}");
    }

    #[test]
    fn a_refused_user_passes_for_nobody_else_by_leaving() {
        const EACH: usize = 60;
        if not_root("clients of another user that leave") {
            return;
        }
        let upstream = Upstream::start(ok);
        // A socket that nobody owns any more says that it is root's.
        let proxy = Launch::to(&upstream)
            .args(["--allow-user", "root", "--http-shutdown"])
            .start();
        let ways: [fn(Client) -> Option<Client>; 4] = [
            |_closed| None,
            |reset| {
                reset.reset();
                None
            },
            |half_closed| {
                half_closed.finish_sending();
                Some(half_closed)
            },
            |half_closed_then_closed| {
                half_closed_then_closed.finish_sending();
                None
            },
        ];
        let mut staying = Vec::new();
        let requests = [
            "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
            "GET /shutdown HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ];
        // All of them have left before the proxy looks at the first; then, whatever comes first.
        for frozen in [true, false] {
            if frozen {
                proxy.freeze();
            }
            for (number, leave) in (0..EACH).flat_map(|_| ways).enumerate() {
                let mut client = client_of(REFUSED, &proxy);
                client.send(requests[number / ways.len() % 2]).unwrap();
                staying.extend(leave(client));
            }
            for number in 0..EACH {
                send_and_exit(proxy.port, requests[number % 2].as_bytes());
            }
            proxy.signal(libc::SIGCONT);
            assert_eq!(status_for(&proxy, 0), 200, "frozen: {frozen}");
        }
        let run = proxy.stop();
        assert_eq!(run.status.code(), Some(0), "{run:?}");
        let refused = format!("uid={REFUSED} status=403");
        let mut served = 0;
        for line in run.stderr.iter().filter(|line| line.contains("uid=")) {
            match line.starts_with("request uid=0 status=200") {
                true => served += 1,
                false => assert!(
                    line.starts_with("refused ")
                        && (line.contains(&refused) || line.contains("uid=- status=403")),
                    "{line}"
                ),
            }
        }
        assert_eq!(served, 2, "root's own");
        assert_eq!(upstream.close().len(), 2, "root's own");
    }

    #[test]
    fn an_allowed_user_who_half_closes_is_not_taken_on_trust() {
        if not_root("a client of another user") {
            return;
        }
        let upstream = Upstream::start(ok);
        let proxy = Launch::to(&upstream)
            .args(["--allow-user", &ALLOWED.to_string()])
            .start();
        proxy.freeze();
        let mut client = client_of(ALLOWED, &proxy);
        client.post("", b"{}").unwrap();
        client.finish_sending();
        proxy.signal(libc::SIGCONT);
        assert_eq!(client.response().unwrap().status(), 403);
        assert_eq!(status_for(&proxy, ALLOWED), 200);
        proxy.stop();
        assert_eq!(upstream.close().len(), 1);
    }

    const USERS: &str = "root:x:0:0::/:/bin/sh
alice:x:3900101:3900101::/:/bin/sh
bob:x:3900102:3900102::/:/bin/sh
carol:x:3900103:3900200::/:/bin/sh
dave:x:3900104:3900104::/:/bin/sh
";

    /// Who may and who may not, when `--allow-user` says `alice` and `@developers`.
    fn assert_served<const N: usize>(proxy: &Proxy, when: &str, expected: [(&str, u32, u16); N]) {
        // What the group database said of somebody is relied on for some seconds.
        let deadline = Instant::now() + PATIENCE;
        for (who, uid, status) in expected {
            while status_for(proxy, uid) != status {
                assert!(Instant::now() < deadline, "{when}: {who}: not {status}");
            }
        }
    }

    #[test]
    fn names_and_groups_are_served_and_a_changed_membership_counts_soon() {
        let what = "users and groups by name";
        if not_root(what) {
            return;
        }
        if Path::new("/var/run/nscd/socket").exists() {
            return skip(what, "a daemon answers for /etc/passwd here");
        }
        let folder = Folder::new();
        let file = |name: &str, content: &str| {
            fs::write(folder.join(name), content).unwrap();
            Mount::file(&folder.join(name), &Path::new("/etc").join(name))
        };
        let groups = "root:x:0:\nprimary:x:3900200:\ndevelopers:x:3900201:root,bob\n";
        let mounts = vec![
            file("passwd", USERS),
            file("group", groups),
            file("nsswitch.conf", "passwd: files\ngroup: files\n"),
        ];
        let upstream = Upstream::start(ok);
        let args = ["alice", "@developers", "@primary"]
            .into_iter()
            .flat_map(|who| ["--allow-user", who]);
        let proxy = match with_mounts(Launch::to(&upstream).args(args), mounts) {
            Ok(launch) => launch.start(),
            Err(error) => return skip(what, &format!("no file system of its own: {error}")),
        };
        assert_served(
            &proxy,
            "at first",
            [
                ("alice, by name", 3_900_101, 200),
                ("bob, a member of a group", 3_900_102, 200),
                ("carol, whose primary group it is", 3_900_103, 200),
                ("dave, in no group", 3_900_104, 403),
                ("one without a name", REFUSED, 403),
            ],
        );
        // In place, for the mount is of the file and not of its name.
        fs::write(
            folder.join("group"),
            "root:x:0:\ndevelopers:x:3900201:dave\nprimary:x:3900202:\n",
        )
        .unwrap();
        assert_served(
            &proxy,
            "with other members",
            [
                ("alice, by name", 3_900_101, 200),
                ("bob, who left", 3_900_102, 403),
                ("carol, whose primary group is another", 3_900_103, 403),
                ("dave, who joined", 3_900_104, 200),
                ("one without a name", REFUSED, 403),
            ],
        );
        fs::write(folder.join("group"), "root:x:0:\n").unwrap();
        assert_served(
            &proxy,
            "without the group",
            [("dave", 3_900_104, 403), ("alice, by name", 3_900_101, 200)],
        );
    }
}
