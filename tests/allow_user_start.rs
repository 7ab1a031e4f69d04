//! Where users can't be told apart, or one is unknown, the program does not start: it never serves more than was meant.

mod support;

#[cfg(not(target_os = "linux"))]
#[test]
fn it_is_an_error_where_the_kernel_does_not_tell_users_apart() {
    let run = support::proxy::Launch::new()
        .args(["--allow-user", "0"])
        .finish();
    assert_ne!(run.status.code(), Some(0), "{run:?}");
    assert!(run.stderr[0].contains("--allow-user"), "{run:?}");
}

#[cfg(target_os = "linux")]
mod linux {
    use super::support::{
        client::Client,
        linux::{before_start, checked},
        proxy::Launch,
        upstream::{Upstream, ok},
    };

    #[test]
    fn an_unknown_name_is_one_sentence_that_says_which() {
        for name in [
            "no-such-user-here",
            "@no-such-group-here",
            "4294967296",
            "-1",
            "@",
            "",
        ] {
            let run = Launch::new()
                .args(["--allow-user", "0"])
                .arg(format!("--allow-user={name}"))
                .finish();
            assert!(!run.status.success(), "{name}: {run:?}");
            let [line] = run.stderr.as_slice() else {
                panic!("{name}: {run:?}");
            };
            assert!(
                line.contains("--allow-user") && line.contains(name),
                "{name}: {line}"
            );
        }
    }

    /// Denies a program netlink sockets in the way of systemd's `RestrictAddressFamilies=`.
    fn without_netlink(mut launch: Launch) -> Launch {
        const SOCKET: u32 = libc::SYS_socket as u32;
        const DENIED: u32 = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
        let load = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
        let equal = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        let end = (libc::BPF_RET | libc::BPF_K) as u16;
        let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        // The call's number is at 0, the lower half of its first argument at 16 (linux/seccomp.h).
        let first_argument = if cfg!(target_endian = "little") {
            16
        } else {
            20
        };
        let mut filter = [
            line(load, 0, 0, 0),
            line(equal, 0, 3, SOCKET),
            line(load, 0, 0, first_argument),
            line(equal, 0, 1, libc::AF_NETLINK as u32),
            line(end, 0, 0, DENIED),
            line(end, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        before_start(launch.command(), move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_mut_ptr(),
            };
            // SAFETY: `program` has a filter of its length, which lives through the calls; the others are integers.
            #[allow(unsafe_code)]
            unsafe {
                checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
                checked(libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::SECCOMP_MODE_FILTER,
                    &raw const program,
                ))
            }
        });
        launch
    }

    #[test]
    fn without_netlink_it_does_not_start_and_says_what_is_missing() {
        let upstream = Upstream::start(ok);
        let run = without_netlink(Launch::to(&upstream).args(["--allow-user", "0"])).finish();
        assert_eq!(run.status.code(), Some(1), "{run:?}");
        let [line] = run.stderr.as_slice() else {
            panic!("not one line: {run:?}");
        };
        assert!(
            line.contains("--allow-user") && line.contains("AF_NETLINK"),
            "{line}"
        );
        // Who doesn't ask for it doesn't need it.
        let proxy = without_netlink(Launch::to(&upstream)).start();
        assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    }
}
