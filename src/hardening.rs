//! Closes the process to onlookers before there is anything to see.
#![allow(unsafe_code)]

use nix::sys::resource::{Resource, setrlimit};

use crate::key::environment;

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
    let refused = |what: &'static str| {
        move |error| {
            format!(
                "cannot {what} for this process: {error}; without that the key would not be safe here"
            )
        }
    };
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("forbid core dumps"))?;
    // Makes `/proc/PID` root's own and ptrace(2) by the same user impossible.
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_dumpable(false).map_err(refused("forbid debuggers"))?;
    #[cfg(target_os = "macos")]
    deny_debuggers().map_err(refused("forbid debuggers"))?;
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_no_new_privs().map_err(refused("give up new privileges"))?;
    let is_for_loader = |name: &[u8]| {
        LOADER_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix))
    };
    for name in environment::names_where(|name, _| is_for_loader(name)) {
        // SAFETY: this function is called before any thread is started.
        unsafe { std::env::remove_var(name) };
    }
    Ok(())
}

/// Makes the kernel refuse debuggers (`PT_DENY_ATTACH`, ptrace(2)).
#[cfg(target_os = "macos")]
fn deny_debuggers() -> nix::Result<()> {
    // SAFETY: with this request, the other arguments are ignored.
    let returned =
        unsafe { nix::libc::ptrace(nix::libc::PT_DENY_ATTACH, 0, std::ptr::null_mut(), 0) };
    nix::errno::Errno::result(returned).map(drop)
}
