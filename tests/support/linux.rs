//! What Linux tells about a process, and what it lets a test make of one that is about to start.

use super::proxy::{Launch, PROGRAM, Proxy};
use std::{
    ffi::CString,
    fs, io,
    os::unix::{ffi::OsStrExt, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

/// A number of bytes that the kernel counts for the proxy (proc_pid_status(5)).
fn status(proxy: &Proxy, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kilobytes = line.and_then(|line| line.strip_prefix(':')?.trim().strip_suffix(" kB"));
    kilobytes.unwrap().parse::<u64>().unwrap() * 1024
}

/// The memory that it holds for itself now, in bytes.
pub(crate) fn own_memory(proxy: &Proxy) -> u64 {
    status(proxy, "RssAnon")
}

/// The most memory that it has ever held, in bytes.
pub(crate) fn peak_memory(proxy: &Proxy) -> u64 {
    status(proxy, "VmHWM")
}

/// How many descriptors it has open. Only root may look.
pub(crate) fn descriptors(proxy: &Proxy) -> usize {
    fs::read_dir(format!("/proc/{}/fd", proxy.pid()))
        .unwrap()
        .count()
}

/// How long it has kept a processor busy, all of its threads together.
pub(crate) fn busy(proxy: &Proxy) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", proxy.pid())).unwrap();
    // The name may hold anything, so what counts is behind its bracket: utime and stime are fields 14 and 15.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split(' ').collect();
    let ticks: u64 = fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap();
    // SAFETY: `sysconf` takes any number.
    #[allow(unsafe_code)]
    let a_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Duration::from_secs(ticks) / u32::try_from(a_second).unwrap()
}

/// Runs something on a thread that is another user's. Root only; the rest of the process stays root's.
pub(crate) fn as_user<T: Send>(uid: u32, run: impl FnOnce() -> T + Send) -> T {
    let switched = || {
        // SAFETY: the call takes integers. Made directly, it changes this one thread, which ends with `run`.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        run()
    };
    thread::scope(|scope| scope.spawn(switched).join().unwrap())
}

/// Has a program do something when it is about to start: system calls only, for it is a fork of a process with threads.
pub(crate) fn before_start(
    command: &mut Command,
    run: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) {
    // SAFETY: the callers' closures make system calls on memory that was allocated before the fork.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(run);
    }
}

/// What a system call says, as std would.
pub(crate) fn checked(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The program may have this many descriptors, and no more by its own will. The numbers in `taken` are in use.
pub(crate) fn limit_descriptors(
    mut launch: Launch,
    limit: libc::rlim_t,
    taken: std::ops::Range<libc::c_int>,
) -> Launch {
    before_start(launch.command(), move || {
        for number in taken.clone() {
            // SAFETY: the call takes integers; whatever was open there is nothing that the program needs.
            #[allow(unsafe_code)]
            checked(unsafe { libc::dup2(libc::STDERR_FILENO, number) })?;
        }
        let limit = libc::rlimit {
            rlim_cur: limit,
            rlim_max: limit,
        };
        // SAFETY: `limit` is a valid `rlimit` for the call, which only reads it.
        #[allow(unsafe_code)]
        checked(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) })
    });
    launch
}

/// Something that a program, and nobody else, finds in its file system.
pub(crate) struct Mount {
    from: CString,
    at: CString,
    kind: CString,
    flags: libc::c_ulong,
    options: CString,
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

impl Mount {
    /// This file in place of another one.
    pub(crate) fn file(from: &Path, at: &Path) -> Self {
        Self {
            from: c_string(from),
            at: c_string(at),
            kind: c"none".into(),
            flags: libc::MS_BIND,
            options: c"".into(),
        }
    }

    /// An empty file system in memory, of this size.
    pub(crate) fn empty(at: &Path, options: &str) -> Self {
        Self {
            from: c"tmpfs".into(),
            at: c_string(at),
            kind: c"tmpfs".into(),
            flags: 0,
            options: CString::new(options).unwrap(),
        }
    }

    fn private() -> Self {
        Self {
            from: c"none".into(),
            at: c"/".into(),
            kind: c"none".into(),
            flags: libc::MS_REC | libc::MS_PRIVATE,
            options: c"".into(),
        }
    }

    fn mount(&self) -> io::Result<()> {
        // SAFETY: all pointers are to C strings that live through the call.
        #[allow(unsafe_code)]
        checked(unsafe {
            libc::mount(
                self.from.as_ptr(),
                self.at.as_ptr(),
                self.kind.as_ptr(),
                self.flags,
                self.options.as_ptr().cast(),
            )
        })
    }
}

/// Gives the program these mounts. An error if this system doesn't let us.
pub(crate) fn with_mounts(mut launch: Launch, mounts: Vec<Mount>) -> io::Result<Launch> {
    // First of all: what is mounted there must not show outside.
    let mounts: Arc<[Mount]> = [Mount::private()].into_iter().chain(mounts).collect();
    let mut trial = Command::new(PROGRAM);
    trial.arg("--version").stdout(Stdio::null());
    for command in [&mut trial, launch.command()] {
        let mounts = Arc::clone(&mounts);
        before_start(command, move || {
            // SAFETY: the call takes an integer.
            #[allow(unsafe_code)]
            checked(unsafe { libc::unshare(libc::CLONE_NEWNS) })?;
            mounts.iter().try_for_each(Mount::mount)
        });
    }
    trial.status()?;
    Ok(launch)
}
