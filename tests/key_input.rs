//! The key's way in: what counts as one, how it may arrive, and that a refused one is never repeated.

mod support;

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::ChildStdin,
    time::Instant,
};
use support::{
    Folder, PATIENCE,
    client::Client,
    proxy::{KEY, Launch, Proxy, assert_one_sentence},
    upstream::{Upstream, ok},
};

/// The longest key: 1024 bytes with `Bearer ` before it.
const LONGEST: usize = 1024 - "Bearer ".len();

/// The key that the upstream gets from this proxy.
fn key_of(proxy: &Proxy, upstream: &Upstream) -> String {
    assert_eq!(Client::connect(proxy.port).ask().unwrap().status(), 200);
    let seen = upstream.seen().pop().unwrap();
    let value = seen.head.get("authorization").unwrap();
    value.strip_prefix("Bearer ").unwrap().to_owned()
}

#[test]
fn the_first_line_is_the_key_however_it_ends() {
    let longest = "k".repeat(LONGEST);
    let cases = [
        ("plain", KEY.to_owned(), KEY),
        ("newline", format!("{KEY}\n"), KEY),
        ("CRLF", format!("{KEY}\r\n"), KEY),
        ("CR", format!("{KEY}\r"), KEY),
        ("two CRs", format!("{KEY}\r\r\n"), KEY),
        ("a second line", format!("{KEY}\nsk-second\n"), KEY),
        ("a second line that is no key", format!("{KEY}\n \0\n"), KEY),
        ("one character", "k".to_owned(), "k"),
        (
            "every character that is allowed",
            "aZ09-_\n".to_owned(),
            "aZ09-_",
        ),
        ("the longest", longest.clone(), &longest),
        ("the longest with CRLF", format!("{longest}\r\n"), &longest),
    ];
    let upstream = Upstream::start(ok);
    for (name, input, expected) in cases {
        let proxy = Launch::to(&upstream).input(input).start();
        assert_eq!(key_of(&proxy, &upstream), expected, "{name}");
    }
}

#[test]
fn the_key_may_come_in_several_short_writes() {
    let upstream = Upstream::start(ok);
    let mut proxy = Launch::to(&upstream).input_later().spawn();
    let mut stdin = proxy.stdin.take().unwrap();
    for byte in KEY.bytes() {
        stdin.write_all(&[byte]).unwrap();
        wait_until_taken(&stdin);
    }
    drop(stdin);
    proxy.wait_until_listening();
    assert_eq!(key_of(&proxy, &upstream), KEY);
}

#[test]
fn a_newline_is_enough_and_what_comes_later_is_not_waited_for() {
    let upstream = Upstream::start(ok);
    let mut proxy = Launch::to(&upstream).input_later().spawn();
    let mut stdin = proxy.stdin.take().unwrap();
    stdin.write_all(format!("{KEY}\n").as_bytes()).unwrap();
    proxy.wait_until_listening();
    assert_eq!(key_of(&proxy, &upstream), KEY);
    drop(stdin);
}

#[test]
fn the_key_may_come_from_a_file() {
    let upstream = Upstream::start(ok);
    let folder = Folder::new();
    let file = folder.join("key");
    std::fs::write(&file, format!("{KEY}\n")).unwrap();
    let proxy = Launch::to(&upstream)
        .stdin(File::open(file).unwrap())
        .start();
    assert_eq!(key_of(&proxy, &upstream), KEY);
}

#[test]
fn a_refused_key_is_one_clear_sentence_that_does_not_repeat_it() {
    const SECRET: &str = "SeCrEt";
    let cases: [(&str, Vec<u8>); 22] = [
        ("nothing", b"".into()),
        ("an empty line", b"\n".into()),
        ("an empty line with CRLF", b"\r\n".into()),
        ("blanks", b"   \t \n".into()),
        ("an empty line before the key", b"\nSeCrEt\n".into()),
        ("a blank before the key", b" SeCrEt\n".into()),
        ("a blank behind the key", b"SeCrEt \n".into()),
        ("a blank in the key", b"sk-SeCrEt sk-SeCrEt\n".into()),
        ("a tab", b"sk-SeCrEt\t\n".into()),
        ("a CR in the key", b"sk-\rSeCrEt\n".into()),
        ("a NUL", b"sk-SeCrEt\0\n".into()),
        ("a dot", b"sk.SeCrEt\n".into()),
        ("a slash", b"sk/SeCrEt\n".into()),
        ("quotes", b"\"sk-SeCrEt\"\n".into()),
        ("an assignment", b"OPENAI_API_KEY=sk-SeCrEt\n".into()),
        ("the scheme before it", b"Bearer sk-SeCrEt\n".into()),
        ("a byte order mark", b"\xef\xbb\xbfsk-SeCrEt\n".into()),
        ("a letter that is not ASCII", "sk-SeCrEté\n".into()),
        ("a byte that is not UTF-8", b"sk-SeCrEt\xff\n".into()),
        (
            "one byte too long",
            [SECRET.as_bytes(), &[b'k'; LONGEST - SECRET.len() + 1]].concat(),
        ),
        (
            "one byte too long with CRLF",
            [
                SECRET.as_bytes(),
                &[b'k'; LONGEST - SECRET.len() + 1],
                b"\r\n",
            ]
            .concat(),
        ),
        (
            "a megabyte without a newline",
            SECRET.repeat(1 << 17).into_bytes(),
        ),
    ];
    for (name, input) in cases {
        let run = Launch::new().input(input).finish();
        assert_one_sentence(name, 1, &run, &["key"]);
        assert!(!run.stderr[0].contains(SECRET), "{name}: {run:?}");
    }
}

#[test]
fn an_input_that_cannot_be_read_is_one_clear_sentence() {
    let mut closed = Launch::new().input_later();
    // SAFETY: `close` is async-signal-safe, and nothing in the child uses the descriptor before it is the program's.
    #[allow(unsafe_code)]
    unsafe {
        closed.command().pre_exec(|| {
            libc::close(0);
            Ok(())
        })
    };
    let folder = Folder::new();
    let cases = [
        ("stdin is closed", closed),
        (
            "stdin is a folder",
            Launch::new().stdin(File::open(folder.path()).unwrap()),
        ),
        (
            "stdin is /dev/null",
            Launch::new().stdin(File::open("/dev/null").unwrap()),
        ),
        (
            "stdin is for writing only",
            Launch::new().stdin(File::create(folder.join("sink")).unwrap()),
        ),
    ];
    for (name, launch) in cases {
        let run = launch.finish();
        assert_eq!(run.status.code(), Some(1), "{name}: {run:?}");
        let [line] = run.stderr.as_slice() else {
            panic!("{name}: not one line but {:#?}", run.stderr);
        };
        assert!(
            line.starts_with("codex-responses-api-proxy: "),
            "{name}: {line}"
        );
    }
}

#[test]
fn a_terminal_is_asked_for_the_key_without_echo() {
    let upstream = Upstream::start(ok);
    let terminal = Terminal::open();
    let mut proxy = terminal.give_to(Launch::to(&upstream)).spawn();
    terminal.wait_for_echo(false);
    terminal.write(&format!("{KEY}\n"));
    proxy.wait_until_listening();
    assert_eq!(key_of(&proxy, &upstream), KEY);
    terminal.wait_for_echo(true);
    let prompt = proxy.log.join("\n") + &terminal.shown();
    assert!(prompt.contains("key"), "it asked for the key: {prompt:?}");
    assert!(!prompt.contains(KEY), "the key was not shown: {prompt:?}");
}

#[test]
fn a_key_refused_at_a_terminal_leaves_it_with_echo() {
    let terminal = Terminal::open();
    let proxy = terminal.give_to(Launch::new()).spawn();
    terminal.wait_for_echo(false);
    terminal.write("sk SeCrEt\n");
    let run = proxy.wait();
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    assert!(terminal.echoes());
    let shown = run.stderr.join("\n") + &terminal.shown();
    assert!(!shown.contains("SeCrEt"), "{shown:?}");
}

#[test]
fn an_interrupt_at_the_prompt_ends_it_and_leaves_the_terminal_with_echo() {
    let terminal = Terminal::open();
    let proxy = terminal.give_to(Launch::new()).spawn();
    terminal.wait_for_echo(false);
    // What Ctrl-C is to a terminal.
    terminal.write("\x03");
    let run = proxy.wait();
    assert!(!run.status.success(), "{run:?}");
    assert!(terminal.echoes(), "echo stays off: {run:?}");
}

/// Waits until the reader has taken everything out of this pipe.
fn wait_until_taken(pipe: &ChildStdin) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut unread: libc::c_int = 0;
        // SAFETY: the descriptor is open, and `FIONREAD` stores one `c_int`.
        #[allow(unsafe_code)]
        let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut unread) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        if unread == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "{unread} bytes are left unread");
        std::thread::yield_now();
    }
}

/// A terminal of the test's own: what is typed into `keyboard` comes out of `line`, and is shown if it echoes.
struct Terminal {
    keyboard: File,
    line: OwnedFd,
}

impl Terminal {
    fn open() -> Self {
        let (mut keyboard, mut line) = (-1, -1);
        // SAFETY: the first two point to valid integers, and the other three may be null.
        #[allow(unsafe_code)]
        let result = unsafe {
            libc::openpty(
                &mut keyboard,
                &mut line,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            )
        };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        for descriptor in [keyboard, line] {
            // SAFETY: both descriptors are open; the call takes integers. A child must not inherit them.
            #[allow(unsafe_code)]
            let result = unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
            assert_eq!(result, 0, "{}", io::Error::last_os_error());
        }
        // SAFETY: both descriptors are open, and nobody else owns them.
        #[allow(unsafe_code)]
        unsafe {
            Self {
                keyboard: File::from_raw_fd(keyboard),
                line: OwnedFd::from_raw_fd(line),
            }
        }
    }

    /// Makes it the stdin of the program, and its controlling terminal.
    fn give_to(&self, launch: Launch) -> Launch {
        let mut launch = launch
            .stdin(self.line.try_clone().unwrap())
            .makes_itself_a_session();
        // SAFETY: `setsid` and `ioctl` are async-signal-safe; descriptor 0 is the terminal by then.
        #[allow(unsafe_code)]
        unsafe {
            launch.command().pre_exec(|| {
                match libc::setsid() != -1 && libc::ioctl(0, libc::TIOCSCTTY as _, 0) != -1 {
                    true => Ok(()),
                    false => Err(io::Error::last_os_error()),
                }
            })
        };
        launch
    }

    fn echoes(&self) -> bool {
        // SAFETY: the descriptor is open, and an all-zero `termios` is a valid one to be filled in.
        #[allow(unsafe_code)]
        let settings = unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            // Through the keyboard's end, which outlives the session on the other.
            assert_eq!(libc::tcgetattr(self.keyboard.as_raw_fd(), &mut settings), 0);
            settings
        };
        settings.c_lflag & libc::ECHO != 0
    }

    /// Waits until the program has turned echo on or off.
    fn wait_for_echo(&self, on: bool) {
        let deadline = Instant::now() + PATIENCE;
        while self.echoes() != on {
            assert!(Instant::now() < deadline, "echo is still {}", !on);
            std::thread::yield_now();
        }
    }

    fn write(&self, text: &str) {
        (&self.keyboard).write_all(text.as_bytes()).unwrap();
    }

    /// What has been shown on it so far.
    fn shown(&self) -> String {
        // Something to read up to. It fails where the session has ended, which ends what there is to read, too.
        let _ = File::from(self.line.try_clone().unwrap()).write_all(b"\x04END");
        let mut shown = Vec::new();
        let mut piece = [0; 256];
        while !shown.ends_with(b"\x04END")
            && let Ok(got @ 1..) = (&self.keyboard).read(&mut piece)
        {
            shown.extend_from_slice(&piece[..got]);
        }
        String::from_utf8_lossy(&shown).into_owned()
    }
}
