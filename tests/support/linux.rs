//! Linux only: reads /proc of the proxy, and changes users, limits and mounts of a process before it starts.

use super::{Proxy, ProxyCommand, dup2, require_root, skip, wait_until};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource::RLIMIT_NOFILE, setrlimit};
use procfs::process::{ProcState, Process};
use std::ops::Range;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::{io, thread};

pub(crate) const MIB: u64 = 1 << 20;

/// The proxy's process in /proc.
pub(crate) fn process(proxy: &Proxy) -> Process {
    Process::new(proxy.pid().as_raw()).unwrap()
}

/// The current anonymous memory and the peak resident memory of the proxy, in bytes.
pub(crate) fn memory_usage(proxy: &Proxy) -> (u64, u64) {
    let status = process(proxy).status().unwrap();
    (status.rssanon.unwrap() * 1024, status.vmhwm.unwrap() * 1024)
}

/// The number of open descriptors of the proxy. Requires root.
pub(crate) fn count_descriptors(proxy: &Proxy) -> usize {
    process(proxy).fd_count().unwrap()
}

pub(crate) fn is_sleeping(process: &Process) -> bool {
    process.stat().unwrap().state().unwrap() == ProcState::Sleeping
}

/// Waits until the proxy sleeps, then checks that it still sleeps in nearly every sample: it does not busy-loop.
pub(crate) fn assert_idle(proxy: &Proxy) {
    const SAMPLES: usize = 2_000;
    let process = process(proxy);
    wait_until("the proxy is idle", || is_sleeping(&process));
    let asleep = (0..SAMPLES).filter(|_| is_sleeping(&process)).count();
    assert!(
        asleep > SAMPLES * 9 / 10,
        "asleep {asleep} times of {SAMPLES}"
    );
}

/// Waits until the proxy sleeps and `number` no longer changes, in many samples.
pub(crate) fn wait_until_idle(proxy: &Proxy, number: impl Fn() -> u64) {
    let process = process(proxy);
    wait_until("the proxy is idle", || {
        let before = number();
        (0..1000).all(|_| is_sleeping(&process) && number() == before)
    });
}

/// Runs a function on a thread with another UID. Requires root; other threads remain root.
pub(crate) fn as_user<T: Send>(uid: u32, run: impl FnOnce() -> T + Send) -> T {
    let switched = || {
        for call in [libc::SYS_setresgid, libc::SYS_setresuid] {
            // SAFETY: the call takes integers only. The raw system call changes this thread only, which ends after `run`.
            #[allow(unsafe_code)]
            let result = unsafe { libc::syscall(call, uid, uid, uid) };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
        }
        run()
    };
    thread::scope(|scope| scope.spawn(switched).join().unwrap())
}

/// Limits the program to this many descriptors, as its hard limit. The descriptors in `taken` are open already.
pub(crate) fn limit_descriptors(
    command: ProxyCommand,
    limit: u64,
    taken: Range<RawFd>,
) -> ProxyCommand {
    command.pre_exec(move || {
        let stderr = libc::STDERR_FILENO;
        taken.clone().try_for_each(|n| dup2(stderr, n))?;
        Ok(setrlimit(RLIMIT_NOFILE, limit, limit)?)
    })
}

const NONE: Option<&Path> = None;

/// A mount that only the program sees.
#[derive(Clone)]
pub(crate) enum Mount {
    /// A bind mount of the first file over the second.
    File(PathBuf, PathBuf),
    /// An empty tmpfs with these options.
    Empty(PathBuf, &'static str),
}

impl Mount {
    fn mount(&self) -> nix::Result<()> {
        match self {
            Self::File(from, at) => mount(Some(from), at, NONE, MsFlags::MS_BIND, NONE),
            Self::Empty(at, options) => {
                let tmpfs = Some("tmpfs");
                mount(tmpfs, at, tmpfs, MsFlags::empty(), Some(*options))
            }
        }
    }
}

/// Starts the program with these mounts. `None`, with the reason on stderr, without root or mount namespaces.
pub(crate) fn start_with_mounts(
    what: &str,
    command: ProxyCommand,
    mounts: Vec<Mount>,
) -> Option<Proxy> {
    if !require_root(what) {
        return None;
    }
    let enter_namespace = move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // Mounts must not propagate to the namespace of the tests.
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        Ok(mounts.iter().try_for_each(Mount::mount)?)
    };
    let trial = ProxyCommand::new()
        .arg("--version")
        .pre_exec(enter_namespace.clone());
    if let Err(error) = trial.try_spawn() {
        skip(what, &format!("no mount namespaces: {error}"));
        return None;
    }
    Some(command.pre_exec(enter_namespace).start())
}
