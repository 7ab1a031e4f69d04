//! What Linux tells about a process, and what it lets a test make of one that is about to start.

use super::{Launch, Proxy, duplicate, is_root_for, skip, wait_until};
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

/// What /proc has of the proxy's process.
pub(crate) fn process(proxy: &Proxy) -> Process {
    Process::new(proxy.pid().as_raw()).unwrap()
}

/// The memory that it holds for itself now, and the most that it has ever held, in bytes.
pub(crate) fn memory(proxy: &Proxy) -> (u64, u64) {
    let status = process(proxy).status().unwrap();
    (status.rssanon.unwrap() * 1024, status.vmhwm.unwrap() * 1024)
}

/// How many descriptors it has open. Only root may look.
pub(crate) fn descriptors(proxy: &Proxy) -> usize {
    process(proxy).fd_count().unwrap()
}

pub(crate) fn sleeps(process: &Process) -> bool {
    process.stat().unwrap().state().unwrap() == ProcState::Sleeping
}

/// Waits until it has nothing to do, and then finds it asleep nearly always: it doesn't try again and again.
pub(crate) fn assert_sleeps(proxy: &Proxy) {
    const LOOKS: usize = 2_000;
    let process = process(proxy);
    wait_until("it has nothing to do", || sleeps(&process));
    let asleep = (0..LOOKS).filter(|_| sleeps(&process)).count();
    assert!(asleep > LOOKS * 9 / 10, "asleep {asleep} times of {LOOKS}");
}

/// Waits until nothing moves: neither this number nor the proxy, however often one looks.
pub(crate) fn wait_until_still(proxy: &Proxy, number: impl Fn() -> u64) {
    let process = process(proxy);
    wait_until("nothing moves", || {
        let before = number();
        (0..1000).all(|_| sleeps(&process) && number() == before)
    });
}

/// Runs something on a thread that is another user's. Root only; the rest of the process stays root's.
pub(crate) fn as_user<T: Send>(uid: u32, run: impl FnOnce() -> T + Send) -> T {
    let switched = || {
        for call in [libc::SYS_setresgid, libc::SYS_setresuid] {
            // SAFETY: the call takes integers. Made directly, it changes this one thread, which ends with `run`.
            #[allow(unsafe_code)]
            let result = unsafe { libc::syscall(call, uid, uid, uid) };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
        }
        run()
    };
    thread::scope(|scope| scope.spawn(switched).join().unwrap())
}

/// The program may have this many descriptors, and no more by its own will. The numbers in `taken` are in use.
pub(crate) fn limit_descriptors(launch: Launch, limit: u64, taken: Range<RawFd>) -> Launch {
    launch.before_start(move || {
        let stderr = libc::STDERR_FILENO;
        taken.clone().try_for_each(|n| duplicate(stderr, n))?;
        Ok(setrlimit(RLIMIT_NOFILE, limit, limit)?)
    })
}

const NONE: Option<&Path> = None;

/// Something that a program, and nobody else, finds in its file system.
#[derive(Clone)]
pub(crate) enum Mount {
    /// This file in place of another one.
    File(PathBuf, PathBuf),
    /// An empty file system in memory, with these options.
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

/// Starts the program with these mounts. Root only; says what is skipped where the system doesn't let even root.
pub(crate) fn start_with_mounts(what: &str, launch: Launch, mounts: Vec<Mount>) -> Option<Proxy> {
    if !is_root_for(what) {
        return None;
    }
    let give = move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        // First of all: what is mounted there must not show outside.
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
        Ok(mounts.iter().try_for_each(Mount::mount)?)
    };
    let trial = Launch::new().arg("--version").before_start(give.clone());
    if let Err(error) = trial.try_spawn() {
        skip(what, &format!("no file system of its own: {error}"));
        return None;
    }
    Some(launch.before_start(give).start())
}
