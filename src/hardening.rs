//! Closes the process to onlookers before there is anything to see.
#![allow(unsafe_code)]

use std::io;

/// Prefixes of the variables by which a dynamic loader lets code be put into a process.
const LOADER_PREFIXES: [&[u8]; 2] = [b"LD_", b"DYLD_"];

/// Forbids core dumps, debuggers and new privileges, and forgets what the loader was told.
///
/// To be called first of all in `main`: it changes the environment, which is sound only while there
/// is one thread, and whatever comes before it is not protected by it.
///
/// # Errors
///
/// A sentence naming the step that the system refused. The program must then end: half a wall is none.
pub fn harden() -> Result<(), String> {
    step("forbid core dumps", forbid_core_dumps())?;
    step("forbid debuggers", forbid_debuggers())?;
    step("give up new privileges", give_up_new_privileges())?;
    forget_loader_variables();
    Ok(())
}

fn step(what: &str, outcome: io::Result<()>) -> Result<(), String> {
    outcome.map_err(|error| {
        format!(
            "cannot {what} for this process: {error}; without that the key would not be safe here"
        )
    })
}

/// Turns a C return value into a result.
pub(crate) fn checked(returned: libc::c_int) -> io::Result<()> {
    if returned == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets both limits of `RLIMIT_CORE` to zero (getrlimit(2)).
fn forbid_core_dumps() -> io::Result<()> {
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `none` is a valid rlimit for the duration of the call, which only reads it.
    checked(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) })
}

/// Makes `/proc/PID` root's own and ptrace(2) by the same user impossible (`PR_SET_DUMPABLE`, prctl(2)).
#[cfg(target_os = "linux")]
fn forbid_debuggers() -> io::Result<()> {
    // SAFETY: the call takes integers only.
    checked(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) })
}

/// Makes the kernel refuse debuggers (`PT_DENY_ATTACH`, ptrace(2)).
#[cfg(target_os = "macos")]
fn forbid_debuggers() -> io::Result<()> {
    // SAFETY: with this request, the other arguments are ignored.
    checked(unsafe { libc::ptrace(libc::PT_DENY_ATTACH, 0, std::ptr::null_mut(), 0) })
}

/// From here on no execve(2) can gain anything (`PR_SET_NO_NEW_PRIVS`, prctl(2)).
#[cfg(target_os = "linux")]
fn give_up_new_privileges() -> io::Result<()> {
    // SAFETY: the call takes integers only.
    checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// macOS has no such promise to make.
#[cfg(target_os = "macos")]
fn give_up_new_privileges() -> io::Result<()> {
    Ok(())
}

fn forget_loader_variables() {
    let found: Vec<_> = std::env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| {
            LOADER_PREFIXES
                .iter()
                .any(|prefix| name.as_encoded_bytes().starts_with(prefix))
        })
        .collect();
    for name in found {
        // SAFETY: `harden` is called before any thread is started.
        unsafe { std::env::remove_var(name) };
    }
}
