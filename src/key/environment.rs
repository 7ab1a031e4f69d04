//! The environment, visited in place: `std::env::vars_os()` copies every value, and a key among them would
//! stay behind in freed memory.
#![allow(unsafe_code)]

use std::ffi::{CStr, OsString, c_char};
use std::os::unix::ffi::OsStringExt;

unsafe extern "C" {
    /// The C library's array of `NAME=value` strings, ended by a null pointer (environ(7)).
    static environ: *mut *mut c_char;
}

/// Calls `visit` with the name and value of every variable; it may overwrite the value. Returns the names for
/// which it returns true.
///
/// To be called only while there is one thread.
pub(crate) fn visit_variables(mut visit: impl FnMut(&[u8], &mut [u8]) -> bool) -> Vec<OsString> {
    let variable_at = |index| {
        // SAFETY: this process may write to the strings, and no other thread reads or changes the array or them:
        // none has been started. The length is that of the string, whose end stays where it is.
        unsafe {
            let start = *environ.add(index).as_ref()?;
            let length = (!start.is_null()).then(|| CStr::from_ptr(start).count_bytes())?;
            Some(std::slice::from_raw_parts_mut(start.cast(), length))
        }
    };
    let visit = |variable: &mut [u8]| {
        let mut parts = variable.splitn_mut(2, |&byte| byte == b'=');
        let (name, value) = (parts.next()?, parts.next()?);
        visit(name, value).then(|| OsString::from_vec(name.to_vec()))
    };
    (0..).map_while(variable_at).filter_map(visit).collect()
}
