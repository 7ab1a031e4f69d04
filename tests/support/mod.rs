//! What the integration tests share: the proxy as a child process, a stand-in upstream, and a client that
//! writes literal bytes. Nothing here understands the program; it starts it, talks to it and looks at it.

// Every test file is a crate of its own and uses its part of this.
#![allow(dead_code)]

pub(crate) mod client;
pub(crate) mod http;
#[cfg(target_os = "linux")]
pub(crate) mod linux;
pub(crate) mod proxy;
pub(crate) mod upstream;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

/// How long anything that must happen may take. Only a test that fails waits this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long something that must happen "at once" may take, on a machine with other work to do.
/// OpenAI's own proxy takes 4 s or more where the tests use this.
pub(crate) const AT_ONCE: Duration = Duration::from_secs(2);

/// Prints why a test, or a part of one, could not run here.
pub(crate) fn skip(what: &str, why: &str) {
    use std::io::Write;
    // Straight to the descriptor: the test harness holds back what `eprintln!` prints in a passing test.
    let _ = writeln!(std::io::stderr().lock(), "skipped: {what}: {why}");
}

/// OpenAI's Codex CLI: what the environment names by `CODEX`, or `codex` on PATH.
pub(crate) fn codex() -> Option<String> {
    let codex = std::env::var("CODEX").unwrap_or_else(|_| "codex".to_owned());
    let version = std::process::Command::new(&codex).arg("--version").output();
    version
        .is_ok_and(|version| version.status.success())
        .then_some(codex)
}

/// Whether the tests run as root.
pub(crate) fn is_root() -> bool {
    // SAFETY: `geteuid` has no preconditions and can't fail.
    #[allow(unsafe_code)]
    unsafe {
        libc::geteuid() == 0
    }
}

/// Lets this process open as many descriptors as its hard limit allows.
pub(crate) fn raise_descriptor_limit(needed: u64) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid `rlimit` for both calls.
    #[allow(unsafe_code)]
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max.min(needed.max(limit.rlim_cur));
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
        }
    };
    assert!(
        raised && limit.rlim_cur >= needed,
        "this test needs {needed} descriptors, the hard limit is {}",
        limit.rlim_max
    );
}

/// A port that nothing listens on, from below the range that the system hands out by itself, so that no other
/// test gets it meanwhile.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 20_000 + ((std::process::id() * 37 + step) % 12_000) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A folder of the test's own that is removed with it. Everyone may enter it.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "codex-responses-proxy-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
