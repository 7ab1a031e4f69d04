//! Started as root, the proxy drops root before it serves requests. Its new user cannot access what root can.

#![cfg(target_os = "linux")]

mod support;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use nix::{errno::Errno, libc};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use support::*;

/// Real, effective, saved and file system UIDs and GIDs of the proxy, and its effective capabilities.
fn ids(proxy: &Proxy) -> ([u32; 4], [u32; 4], u64) {
    let s = process(proxy).status().unwrap();
    let users = [s.ruid, s.euid, s.suid, s.fuid];
    (users, [s.rgid, s.egid, s.sgid, s.fgid], s.capeff)
}

/// Whether the process is dumpable. If not, its files in /proc belong to root.
fn is_dumpable(proxy: &Proxy) -> bool {
    let memory = fs::metadata(format!("/proc/{}/mem", proxy.pid())).unwrap();
    memory.uid() != 0
}

#[test]
fn drops_root_groups_and_capabilities_before_serving() {
    if !require_root("dropping root") {
        return;
    }
    let (_upstream, proxy) = serve(ok);
    let id = 0x7000_0000 + proxy.pid().as_raw().cast_unsigned();
    assert_eq!(ids(&proxy), ([id; 4], [id; 4], 0));
    assert_eq!(process(&proxy).status().unwrap().groups, [0; 0]);
    assert!(!is_dumpable(&proxy));
    assert_eq!(proxy.post_default().status(), 200);
}

#[test]
fn dropped_user_cannot_access_roots_resources() {
    if !require_root("dropping root") {
        return;
    }
    let proxy = ProxyCommand::new().start();
    let dir = TestDir::new();
    let (file, socket) = (dir.join("file"), dir.join("socket"));
    fs::write(&file, "").unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    for path in [&file, &socket] {
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }
    let memory = format!("/proc/{}/mem", proxy.pid());
    let attempt = |what: &str| -> io::Result<()> {
        match what {
            "read" => File::open(&file).map(drop),
            "connect" => UnixStream::connect(&socket).map(drop),
            "read the proxy's memory" => File::open(&memory).map(drop),
            _ => Ok(kill(Pid::parent(), None::<Signal>)?),
        }
    };
    for what in ["read", "connect", "read the proxy's memory", "signal"] {
        attempt(what).expect(what);
        let error = as_user(ids(&proxy).0[0], || attempt(what)).expect_err(what);
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{what}");
    }
}

#[test]
fn stays_root_where_necessary_and_logs_the_reason() {
    if !require_root("staying root") {
        return;
    }
    let upstream = Upstream::start(ok);
    let dir = TestDir::new();
    let dumping = ProxyCommand::for_upstream(&upstream)
        .arg("--dump-dir")
        .arg(dir.join("dumps"));
    let incapable = ProxyCommand::for_upstream(&upstream).pre_exec(|| {
        const CAP_SETUID: libc::c_ulong = 7;
        // SAFETY: the call takes integers only.
        #[allow(unsafe_code)]
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_SETUID, 0, 0, 0) };
        Errno::result(result).map(drop).map_err(io::Error::from)
    });
    for (command, reason) in [(dumping, "--dump-dir"), (incapable, "EPERM")] {
        let proxy = command.start();
        let is_reason = |line: &&String| line.starts_with("stays root: ") && line.contains(reason);
        assert_eq!(proxy.log.iter().filter(is_reason).count(), 1, "{reason}");
        assert_eq!(ids(&proxy).0, [0; 4], "{reason}");
        assert!(!is_dumpable(&proxy), "{reason}");
        assert_eq!(proxy.post_default().status(), 200, "{reason}");
    }
}
