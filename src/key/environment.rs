//! The environment, visited in place: `std::env::vars_os()` copies every value, and a key among them would
//! stay behind in freed memory.
#![allow(unsafe_code)]

use std::ffi::{CStr, OsString, c_char};
use std::os::unix::ffi::OsStringExt;

/// Calls `visit` with the name and value of every variable; it may overwrite the value. Returns the names for
/// which it returns true.
///
/// To be called only while there is one thread.
pub(crate) fn visit_variables(mut visit: impl FnMut(&[u8], &mut [u8]) -> bool) -> Vec<OsString> {
    let mut found = Vec::new();
    let mut entry = environ();
    // SAFETY: `environ` (environ(7)) is an array of NUL-terminated strings that this process may write
    // to, ended by a null pointer, and no other thread reads or changes it: none has been started.
    while let Some(&mut variable) = unsafe { entry.as_mut() }.filter(|variable| !variable.is_null())
    {
        // SAFETY: as above; the length is that of the string, whose end stays where it is.
        let variable = unsafe {
            let length = CStr::from_ptr(variable).count_bytes();
            entry = entry.add(1);
            std::slice::from_raw_parts_mut(variable.cast::<u8>(), length)
        };
        let Some(equals) = variable.iter().position(|&byte| byte == b'=') else {
            continue;
        };
        let (name, value) = variable.split_at_mut(equals);
        if visit(name, &mut value[1..]) {
            found.push(OsString::from_vec(name.to_vec()));
        }
    }
    found
}

#[cfg(target_os = "linux")]
fn environ() -> *mut *mut c_char {
    unsafe extern "C" {
        static environ: *mut *mut c_char;
    }
    // SAFETY: a pointer that the C library defines; it is read by value, before there is a second thread.
    unsafe { environ }
}

#[cfg(target_os = "macos")]
fn environ() -> *mut *mut c_char {
    // SAFETY: the function takes nothing and returns the address of the C library's pointer.
    unsafe { *nix::libc::_NSGetEnviron() }
}
