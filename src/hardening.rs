//! Hardens the process before the key is read; partial hardening is fatal.
#![allow(unsafe_code)]

use nix::sys::resource::{Resource, setrlimit};

use crate::key::environment;

/// Forbids core dumps, debuggers and new privileges, and removes the loader's variables.
///
/// To be called first of all in `main`: it changes the environment, which is sound only while there
/// is one thread, and it does not protect what comes before it. On an error, which names the step that
/// the system refused, the program must exit.
pub(crate) fn harden() -> Result<(), String> {
    let refused = |step| move |error| format!("cannot {step}, so the key is unsafe here: {error}");
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("forbid core dumps"))?;
    // Makes `/proc/PID` root's own and ptrace(2) by the same user impossible.
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_dumpable(false).map_err(refused("forbid debuggers"))?;
    #[cfg(target_os = "macos")]
    deny_debuggers().map_err(refused("forbid debuggers"))?;
    #[cfg(target_os = "linux")]
    nix::sys::prctl::set_no_new_privs().map_err(refused("give up new privileges"))?;
    // Variables by which a dynamic loader loads code into a process.
    let is_loaders = |name: &[u8]| name.starts_with(b"LD_") || name.starts_with(b"DYLD_");
    for name in environment::visit_variables(|name, _| is_loaders(name)) {
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
