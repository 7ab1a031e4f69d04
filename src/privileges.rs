//! Drops root once it is no longer needed.

use nix::sys::prctl::set_dumpable;
use nix::unistd::{Gid, Uid, geteuid, setgroups, setresgid, setresuid};

/// The first of the ids that no account has: systemd documents 0x7000_0000 to 0x7fff_fffe as unused
/// ("Users, Groups, UIDs and GIDs on systemd systems"). The pid is added, so that two proxies don't
/// share a user. Not 65534 (nobody), which other services share.
const FIRST_UNUSED_ID: u32 = 0x7000_0000;

/// Changes to a user and group that nothing else runs as, if the process runs as root. Dropping
/// capabilities alone would not do: root without any still owns root's files and sockets.
///
/// To be called before any thread is started. With `needs_root`, or if the kernel refuses (without
/// `CAP_SETUID`, or in a user namespace with a single id), the process stays root and logs the reason.
/// If it can't be made undumpable again, which is an error, it must exit.
pub(crate) fn drop_root(needs_root: bool) -> Result<(), String> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let id = FIRST_UNUSED_ID + std::process::id();
    let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
    let change = || {
        setgroups(&[])?;
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)
    };
    if needs_root {
        log!("stays root: the --dump-dir is root's");
    } else if let Err(error) = change() {
        log!("stays root: cannot change to an unused user: {error}");
    }
    // Changed ids reset it to fs.suid_dumpable (prctl(2), PR_SET_DUMPABLE), also where only some changed.
    set_dumpable(false).map_err(|error| format!("cannot forbid debuggers as another user: {error}"))
}
