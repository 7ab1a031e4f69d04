//! The key on stdin: valid and invalid keys, how they may arrive, and that no message repeats a rejected one.

mod support;

use nix::fcntl::{FcntlArg::F_SETFD, FdFlag, fcntl};
use nix::libc;
use nix::pty::{OpenptyResult, openpty};
use nix::sys::termios::{LocalFlags, tcgetattr};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::{fd::OwnedFd, unix::net::UnixDatagram};
use support::*;

/// The maximum length of a key for OpenAI: 1024 bytes including `Bearer `.
const LONGEST: usize = 1024 - "Bearer ".len();

/// The key that the upstream receives from this proxy.
fn key_of(proxy: &Proxy, upstream: &Upstream) -> String {
    assert_eq!(proxy.post_default().status(), 200);
    let head = upstream.requests().pop().unwrap().head;
    let value = head.get("authorization").unwrap();
    value.strip_prefix("Bearer ").unwrap().to_owned()
}

#[test]
fn first_line_without_its_end_is_the_key() {
    let longest = "k".repeat(LONGEST);
    let upstream = Upstream::start(ok);
    // The unit tests of `key` have more cases.
    for (key, end) in [
        (KEY, ""),
        (KEY, "\n \0\n"),
        ("aZ09-_", "\n"),
        (&longest, "\r\n"),
        // Keys of other providers.
        ("QUJD/+RA==", "\r\n"),
        ("id:name|eyJh.e30.c2ln~1", " \n"),
        (&"t".repeat(4072), "\r\n"),
    ] {
        let proxy = ProxyCommand::for_upstream(&upstream)
            .stdin_bytes(format!("{key}{end}"))
            .start();
        assert_eq!(key_of(&proxy, &upstream), key, "{end:?}");
    }
}

#[test]
fn key_may_arrive_in_bytes_from_a_file_or_on_an_open_stdin() {
    let upstream = Upstream::start(ok);
    // Each datagram is a separate read, and an empty one is the end of the input.
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    let mut in_bytes = ProxyCommand::for_upstream(&upstream)
        .stdin(OwnedFd::from(theirs))
        .spawn();
    KEY.bytes().for_each(|byte| _ = ours.send(&[byte]).unwrap());
    ours.send(b"").unwrap();

    let dir = TestDir::new();
    let (file, line) = (dir.join("key"), format!("{KEY}\n"));
    fs::write(&file, &line).unwrap();
    let from_file = ProxyCommand::for_upstream(&upstream).stdin(File::open(file).unwrap());

    // A newline ends the key. The proxy must not wait for the end of the input.
    let mut open = ProxyCommand::for_upstream(&upstream).open_stdin().spawn();
    let mut stdin = open.stdin.take().unwrap();
    stdin.write_all(line.as_bytes()).unwrap();
    for proxy in [&mut in_bytes, &mut from_file.spawn(), &mut open] {
        proxy.wait_until_listening();
        assert_eq!(key_of(proxy, &upstream), KEY);
    }
    drop(stdin);
}

#[test]
fn invalid_key_is_rejected_without_repeating_it() {
    let too_long = format!("SeCrEt{}\r\n", "k".repeat(LONGEST - 5));
    let endless = "SeCrEt".repeat(1 << 17);
    // The unit tests of `key` have more cases.
    for input in [
        b"".as_slice(),
        b"Bearer sk-SeCrEt\n",
        b"sk-\xef\xbb\xbfSeCrEt\n",
        b"SeCrEt.SeCrEt==\n",
        b"sk-SeCrEt\xff\n",
        too_long.as_bytes(),
        endless.as_bytes(),
    ] {
        let start = &input[..input.len().min(40)];
        let name = start.escape_ascii().to_string();
        let command = ProxyCommand::new().stdin_bytes(input);
        let line = command.assert_startup_error(&name, 1, &["key"]);
        assert!(!line.contains("SeCrEt"), "{name}: {line}");
    }
}

#[test]
fn unusable_stdin_is_a_startup_error() {
    let dir = TestDir::new();
    let closed = ProxyCommand::new().open_stdin();
    let with = |file: io::Result<File>| ProxyCommand::new().stdin(file.unwrap());
    for (name, command) in [
        ("closed", closed.pre_exec(|| Ok(nix::unistd::close(0)?))),
        ("a dir", with(File::open(&*dir))),
        ("/dev/null", with(File::open("/dev/null"))),
        ("write-only", with(File::create(dir.join("sink")))),
    ] {
        command.assert_startup_error(name, 1, &[]);
    }
}

#[test]
fn terminal_prompt_disables_echo_and_restores_it() {
    let upstream = Upstream::start(ok);
    // A valid key, an invalid key, and Ctrl-C.
    let good = format!("{KEY}\n");
    for (typed, code) in [(&*good, Some(0)), ("sk SeCrEt\n", Some(1)), ("\x03", None)] {
        let terminal = Terminal::open();
        let mut proxy = terminal
            .give_to(ProxyCommand::for_upstream(&upstream))
            .spawn();
        terminal.wait_for_echo(false);
        terminal.write(typed);
        if typed == good {
            proxy.wait_until_listening();
            assert_eq!(key_of(&proxy, &upstream), KEY);
            terminal.wait_for_echo(true);
            proxy.signal(nix::sys::signal::Signal::SIGTERM);
        }
        let run = proxy.wait();
        assert_eq!(run.status.success(), typed == good, "{run:?}");
        assert!(code.is_none() || run.status.code() == code, "{run:?}");
        assert!(terminal.echoes(), "echo is still off: {run:?}");
        let shown = run.stderr.join("\n") + &terminal.shown();
        assert!(shown.contains("key"), "no prompt for the key: {shown:?}");
        let repeated = shown.contains(KEY) || shown.contains("SeCrEt");
        assert!(!repeated, "the key was shown: {shown:?}");
    }
}

/// A pseudoterminal: bytes written to `keyboard` can be read from `line`, and are echoed while echo is on.
struct Terminal {
    keyboard: File,
    line: OwnedFd,
}

impl Terminal {
    fn open() -> Self {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        for descriptor in [&master, &slave] {
            // Children must not inherit them.
            fcntl(descriptor, F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        }
        let (keyboard, line) = (File::from(master), slave);
        Self { keyboard, line }
    }

    /// Makes it the stdin and the controlling terminal of the program.
    fn give_to(&self, command: ProxyCommand) -> ProxyCommand {
        let command = command.stdin(self.line.try_clone().unwrap());
        command.pre_exec(|| {
            // SAFETY: the call takes integers only. Descriptor 0 is already the terminal.
            #[allow(unsafe_code)]
            match unsafe { libc::ioctl(0, libc::TIOCSCTTY as _, 0) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }

    fn echoes(&self) -> bool {
        // `line` is invalid once the session has ended; `keyboard` is not.
        let settings = tcgetattr(&self.keyboard).unwrap();
        settings.local_flags.contains(LocalFlags::ECHO)
    }

    fn wait_for_echo(&self, on: bool) {
        wait_until("echo has changed", || self.echoes() == on);
    }

    fn write(&self, text: &str) {
        (&self.keyboard).write_all(text.as_bytes()).unwrap();
    }

    /// Everything shown on it so far.
    fn shown(&self) -> String {
        // A mark for the end. This fails once the session has ended, but then reading ends as well.
        let _ = File::from(self.line.try_clone().unwrap()).write_all(b"\x04END");
        let mut shown = Vec::new();
        let mut part = [0; 256];
        while !shown.ends_with(b"\x04END")
            && let Ok(got @ 1..) = (&self.keyboard).read(&mut part)
        {
            shown.extend_from_slice(&part[..got]);
        }
        String::from_utf8_lossy(&shown).into_owned()
    }
}
