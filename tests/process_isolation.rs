//! Other processes cannot read the proxy's stdin, environment or memory.

#![cfg(target_os = "linux")]

mod support;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::unistd::{Pid, geteuid};
use procfs::process::LimitValue;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::{fs::PermissionsExt, process::CommandExt};
use std::path::Path;
use std::process::{Command, Stdio};
use support::*;

#[test]
fn stdin_descriptors_and_environment_do_not_reveal_the_key() {
    if !require_root("reading all descriptors and the environment") {
        return;
    }
    let dir = TestDir::new();
    let file = dir.join("key");
    fs::write(&file, format!("{KEY}\n")).unwrap();
    let from_file = ProxyCommand::new().stdin(File::open(&file).unwrap());
    for command in [ProxyCommand::new(), from_file] {
        // With `printenv OPENAI_API_KEY | …`, the key is in the environment as well.
        let command = command.env("OPENAI_API_KEY", KEY);
        let proxy = command.env("PREFIXED", format!("x{KEY}")).start();
        let descriptors = format!("/proc/{}/fd", proxy.pid());
        for entry in fs::read_dir(&descriptors).unwrap() {
            let entry = entry.unwrap();
            let target = fs::read_link(entry.path()).unwrap();
            assert_ne!(target, file);
            if entry.file_name() == "0" {
                assert_eq!(target, Path::new("/dev/null"));
            }
        }
        let environment = fs::read(format!("/proc/{}/environ", proxy.pid())).unwrap();
        let environment = String::from_utf8_lossy(&environment);
        assert!(environment.contains("OPENAI_API_KEY="), "{environment}");
        assert!(!environment.contains(KEY), "{environment}");
    }
}

#[test]
fn core_dumps_and_new_privileges_are_disabled() {
    let proxy = ProxyCommand::new().start();
    let core = process(&proxy).limits().unwrap().max_core_file_size;
    let is_zero = |limit| matches!(limit, LimitValue::Value(0));
    assert!(is_zero(core.soft_limit) && is_zero(core.hard_limit));
    assert_eq!(process(&proxy).status().unwrap().nonewprivs, Some(1));
}

/// Tries to access a process in one of several ways.
fn inspect(pid: Pid, what: &str) -> io::Result<()> {
    match what {
        "ptrace" => Ok(ptrace::seize(pid, ptrace::Options::empty())?),
        "pidfd_getfd" => {
            // SAFETY: both calls take integers only.
            #[allow(unsafe_code)]
            let result = unsafe {
                let pidfd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0))?;
                libc::syscall(libc::SYS_pidfd_getfd, pidfd, 1, 0)
            };
            Errno::result(result).map(drop).map_err(io::Error::from)
        }
        "fd" => fs::read_dir(format!("/proc/{pid}/fd")).map(drop),
        _ => {
            let mut file = File::open(format!("/proc/{pid}/{what}"))?;
            // Reading address 0 of `mem` fails even with access, so only `open` counts.
            match file.read(&mut [0]) {
                Err(error) if what != "mem" => Err(error),
                _ => Ok(()),
            }
        }
    }
}

#[test]
fn process_of_the_same_user_cannot_inspect_the_proxy() {
    // Root can inspect everything. As root, this test runs both processes as another user.
    const USER: u32 = 65534;
    let root = geteuid().is_root();
    let as_other = |mut command: Command| {
        if root {
            command.uid(USER).gid(USER);
        }
        command
    };
    let dir = TestDir::new();
    let program = dir.join("program");
    fs::copy(PROGRAM, &program).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let proxy = ProxyCommand::from_command(as_other(Command::new(&program))).start();
    let mut ordinary = Command::new("cat");
    ordinary.stdin(Stdio::piped());
    let ordinary = ProxyCommand::from_command(as_other(ordinary))
        .open_stdin()
        .spawn();

    for what in "mem maps smaps environ auxv stack fd fd/0 ptrace pidfd_getfd".split(' ') {
        let inspect = |pid| match root {
            true => as_user(USER, || inspect(pid, what)),
            false => inspect(pid, what),
        };
        let reading_a_pipe_would_block = what == "fd/0";
        if !reading_a_pipe_would_block && let Err(error) = inspect(ordinary.pid()) {
            // The test proves nothing if the system denies access to every process.
            let why = format!("an ordinary process cannot be inspected either: {error}");
            skip(what, &why);
            continue;
        }
        let error = inspect(proxy.pid()).expect_err(what);
        let denied = error.kind() == io::ErrorKind::PermissionDenied;
        assert!(denied, "{what}: {error}");
    }
}
