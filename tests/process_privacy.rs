//! What can be seen of the process from outside: not its stdin, not its memory, and nowhere the key.

mod support;

#[cfg(not(target_os = "linux"))]
#[test]
fn the_process_shows_nothing() {
    support::skip(
        "looking at the process from outside",
        "this needs /proc, which only Linux has",
    );
}

#[cfg(target_os = "linux")]
mod linux {
    use super::support::{
        Folder,
        client::Client,
        is_root,
        proxy::{KEY, Launch, PROGRAM, Proxy},
        upstream::{Upstream, ok},
    };
    use std::{
        ffi::CString,
        fs::{self, File},
        io,
        os::unix::{fs::PermissionsExt, process::CommandExt},
        path::Path,
        process::{Child, Command, Stdio},
    };

    fn proc(proxy: &Proxy, name: &str) -> String {
        format!("/proc/{}/{name}", proxy.pid())
    }

    #[test]
    fn stdin_is_dev_null_once_the_key_is_read() {
        let folder = Folder::new();
        let file = folder.join("key");
        fs::write(&file, format!("{KEY}\n")).unwrap();
        let from_file = Launch::new().stdin(File::open(&file).unwrap()).start();
        for (name, proxy) in [
            ("from a pipe", Launch::new().start()),
            ("from a file", from_file),
        ] {
            let stdin = fs::read_link(proc(&proxy, "fd/0"));
            // Where the test may not look, the kernel says so, which the other tests are about.
            match stdin {
                Ok(stdin) => assert_eq!(stdin, Path::new("/dev/null"), "{name}"),
                Err(_) if !is_root() => super::support::skip("looking at fd 0", "only root may"),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }

    #[test]
    fn no_descriptor_leads_to_the_key() {
        if !is_root() {
            return super::support::skip("looking at all descriptors", "only root may");
        }
        let folder = Folder::new();
        let file = folder.join("key");
        fs::write(&file, format!("{KEY}\n")).unwrap();
        let proxy = Launch::new().stdin(File::open(&file).unwrap()).start();
        for entry in fs::read_dir(proc(&proxy, "fd")).unwrap() {
            let target = fs::read_link(entry.unwrap().path()).unwrap();
            assert_ne!(target, file);
        }
    }

    #[test]
    fn the_key_is_not_on_the_command_line_nor_in_the_environment() {
        if !is_root() {
            return super::support::skip("reading the proxy's environment", "only root may");
        }
        let upstream = Upstream::start(ok);
        // As with `printenv OPENAI_API_KEY | …`: whoever pipes the key in often has it in the environment, too.
        let proxy = Launch::to(&upstream)
            .env("OPENAI_API_KEY", KEY)
            .env("PREFIXED", format!("x{KEY}"))
            .start();
        Client::connect(proxy.port).ask().unwrap();
        for name in ["cmdline", "environ"] {
            let bytes = fs::read(proc(&proxy, name)).unwrap();
            assert!(!bytes.is_empty(), "{name}");
            assert!(!String::from_utf8_lossy(&bytes).contains(KEY), "{name}");
        }
    }

    #[test]
    fn it_dumps_no_core_and_gains_no_privileges() {
        let proxy = Launch::new().start();
        let limits = fs::read_to_string(proc(&proxy, "limits")).unwrap();
        let core = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"))
            .unwrap();
        let core: Vec<_> = core.split_whitespace().skip(4).take(2).collect();
        assert_eq!(core, ["0", "0"]);
        let status = fs::read_to_string(proc(&proxy, "status")).unwrap();
        assert!(
            status.lines().any(|line| line == "NoNewPrivs:\t1"),
            "{status}"
        );
    }

    /// What another process tries on this one. It runs between fork and exec, so it may only make system calls.
    type Attempt = fn(libc::pid_t, &CString) -> io::Result<()>;

    fn open(_: libc::pid_t, path: &CString) -> io::Result<()> {
        // SAFETY: the path ends with a NUL, and the call has no other pointers.
        #[allow(unsafe_code)]
        let descriptor = unsafe { libc::open(path.as_ptr(), libc::O_RDONLY) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut byte = 0_u8;
        // Of `mem`, nothing is at address 0: being let in is what counts.
        let is_memory = path.as_bytes().ends_with(b"/mem") || path.as_bytes().ends_with(b"/fd");
        // SAFETY: at most one byte goes to `byte`, which holds one.
        #[allow(unsafe_code)]
        let got = unsafe { libc::read(descriptor, (&raw mut byte).cast(), 1) };
        if got < 0 && !is_memory {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn attach(pid: libc::pid_t, _: &CString) -> io::Result<()> {
        // SAFETY: `PTRACE_SEIZE` takes no pointers.
        #[allow(unsafe_code)]
        let result = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn copy_descriptor(pid: libc::pid_t, _: &CString) -> io::Result<()> {
        // SAFETY: both calls take integers only.
        #[allow(unsafe_code)]
        let result = unsafe {
            let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            match pidfd < 0 {
                true => pidfd,
                false => libc::syscall(libc::SYS_pidfd_getfd, pidfd, 1, 0),
            }
        };
        match result {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes this attempt in a process of its own, as this user.
    fn attempt(user: Option<u32>, attempt: Attempt, pid: u32, path: &str) -> io::Result<()> {
        let path = CString::new(path).unwrap();
        let mut command = Command::new("true");
        become_user(&mut command, user);
        // SAFETY: an `Attempt` makes system calls only, and the error that it returns needs no memory.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(move || attempt(pid.cast_signed(), &path))
        };
        command.status().map(|_| ())
    }

    fn become_user(command: &mut Command, user: Option<u32>) {
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
    }

    struct KilledOnDrop(Child);

    impl Drop for KilledOnDrop {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn another_process_of_the_same_user_can_look_at_nothing() {
        // Root may look at everything; so as root, both are somebody else.
        let user = is_root().then_some(65534);
        let folder = Folder::new();
        let program = folder.join("program");
        fs::copy(PROGRAM, &program).unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let mut command = Command::new(&program);
        become_user(&mut command, user);
        let proxy = Launch::of(command).start();
        let mut ordinary = Command::new("cat");
        become_user(&mut ordinary, user);
        let ordinary = ordinary
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let ordinary = KilledOnDrop(ordinary);

        let attempts: [(&str, Attempt); 10] = [
            ("mem", open),
            ("maps", open),
            ("smaps", open),
            ("environ", open),
            ("auxv", open),
            ("stack", open),
            ("fd", open),
            ("fd/0", open),
            ("ptrace", attach),
            ("pidfd_getfd", copy_descriptor),
        ];
        for (name, how) in attempts {
            let try_on = |pid| attempt(user, how, pid, &format!("/proc/{pid}/{name}"));
            let reading_a_pipe_would_block = name == "fd/0";
            if !reading_a_pipe_would_block && let Err(error) = try_on(ordinary.0.id()) {
                // It must be the proxy that forbids it.
                super::support::skip(
                    name,
                    &format!("not even an ordinary process can be looked at: {error}"),
                );
                continue;
            }
            let error = try_on(proxy.pid()).expect_err(name);
            let denied = [libc::EACCES, libc::EPERM];
            assert!(
                denied.contains(&error.raw_os_error().unwrap()),
                "{name}: {error}"
            );
        }
    }
}
