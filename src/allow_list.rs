//! Which users are served: `--allow-user`.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::rc::Rc;

/// The largest buffer for an entry of the user or group database, in bytes; huge groups need much.
const MAX_ENTRY: usize = 16 << 20;

/// Who may use the proxy.
#[derive(Debug, Default)]
pub struct AllowList {
    uids: Vec<u32>,
    groups: Vec<Rc<str>>,
}

impl AllowList {
    /// Takes the values of `--allow-user`: a name, a uid or `@` and a group's name.
    ///
    /// # Errors
    ///
    /// A sentence naming what this system doesn't know.
    pub fn parse(values: &[String]) -> Result<Self, String> {
        if !cfg!(target_os = "linux") && !values.is_empty() {
            return Err("--allow-user works on Linux only, where the kernel tells whose connection is whose".into());
        }
        let mut list = Self::default();
        for value in values {
            let unknown = |what: &str| {
                format!("--allow-user {value:?}: there is no such {what} on this system")
            };
            let failed =
                |error: io::Error| format!("--allow-user {value:?} can't be looked up: {error}");
            if let Some(group) = value.strip_prefix('@') {
                gid_of(group)
                    .map_err(failed)?
                    .ok_or_else(|| unknown("group"))?;
                list.groups.push(group.into());
            } else if value.bytes().all(|byte| byte.is_ascii_digit()) && !value.is_empty() {
                list.uids.push(value.parse().map_err(|_| unknown("uid"))?);
            } else {
                list.uids.push(
                    uid_of(value)
                        .map_err(failed)?
                        .ok_or_else(|| unknown("user"))?,
                );
            }
        }
        Ok(list)
    }

    /// Whether nobody was named, so that everybody may.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.uids.is_empty() && self.groups.is_empty()
    }

    /// Whether the user may, by the group database as it is now.
    ///
    /// The database may be somewhere on the network, so it is asked on a thread of its own.
    pub async fn permits(&self, uid: u32) -> bool {
        if self.uids.contains(&uid) {
            return true;
        }
        if self.groups.is_empty() {
            return false;
        }
        let groups: Vec<String> = self.groups.iter().map(|group| group.to_string()).collect();
        let lookup = move || {
            groups
                .iter()
                .any(|group| is_member(uid, group).unwrap_or(false))
        };
        tokio::task::spawn_blocking(lookup).await.unwrap_or(false)
    }
}

/// Whether the user is in the group, as its primary one or another.
fn is_member(uid: u32, group: &str) -> io::Result<bool> {
    let (Some(wanted), Some((name, primary))) = (gid_of(group)?, user_of(uid)?) else {
        return Ok(false);
    };
    let mut gids = vec![0; 64];
    loop {
        let mut count = libc::c_int::try_from(gids.len()).map_err(io::Error::other)?;
        // SAFETY: `name` is a C string, and the call writes at most `count` groups to `gids`.
        let fits = unsafe {
            libc::getgrouplist(name.as_ptr(), primary as _, gids.as_mut_ptr(), &mut count)
        } >= 0;
        let count = usize::try_from(count).unwrap_or(0);
        if fits {
            return Ok(gids[..count.min(gids.len())]
                .iter()
                .any(|&gid| gid as libc::gid_t == wanted));
        }
        if gids.len() >= MAX_ENTRY {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        gids.resize(count.max(gids.len() * 2), 0);
    }
}

fn uid_of(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    // SAFETY: getpwnam_r(3), with a C string for the name; `lookup` gives the rest.
    let get = |entry, buffer, size, result| unsafe {
        libc::getpwnam_r(name.as_ptr(), entry, buffer, size, result)
    };
    lookup(get, |entry: &libc::passwd| entry.pw_uid)
}

/// The user's name and primary group.
fn user_of(uid: u32) -> io::Result<Option<(CString, libc::gid_t)>> {
    // SAFETY: getpwuid_r(3); `lookup` gives what it writes to.
    let get =
        |entry, buffer, size, result| unsafe { libc::getpwuid_r(uid, entry, buffer, size, result) };
    lookup(get, |entry: &libc::passwd| {
        // SAFETY: in an entry that was found, the name is a C string in the buffer, which is still there.
        let name = unsafe { CStr::from_ptr(entry.pw_name) };
        (name.to_owned(), entry.pw_gid)
    })
}

fn gid_of(group: &str) -> io::Result<Option<libc::gid_t>> {
    let group = CString::new(group)?;
    // SAFETY: getgrnam_r(3), with a C string for the name; `lookup` gives the rest.
    let get = |entry, buffer, size, result| unsafe {
        libc::getgrnam_r(group.as_ptr(), entry, buffer, size, result)
    };
    lookup(get, |entry: &libc::group| entry.gr_gid)
}

/// Calls a `get…_r` function (getpwnam_r(3)) with ever larger buffers until the entry fits, and takes
/// from the entry what is wanted, if there is one.
fn lookup<E, T>(
    get: impl Fn(*mut E, *mut libc::c_char, usize, *mut *mut E) -> libc::c_int,
    take: impl FnOnce(&E) -> T,
) -> io::Result<Option<T>> {
    let mut entry = MaybeUninit::<E>::zeroed();
    let mut buffer: Vec<libc::c_char> = vec![0; 1024];
    loop {
        let mut found = std::ptr::null_mut();
        match get(
            entry.as_mut_ptr(),
            buffer.as_mut_ptr(),
            buffer.len(),
            &mut found,
        ) {
            0 if found.is_null() => return Ok(None),
            // SAFETY: the function has filled the entry, whose strings lie in `buffer`.
            0 => return Ok(Some(take(unsafe { entry.assume_init_ref() }))),
            libc::ERANGE if buffer.len() < MAX_ENTRY => buffer.resize(buffer.len() * 4, 0),
            // What getpwnam_r(3) lists for "not found" on various systems.
            libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM => return Ok(None),
            libc::EINTR => {}
            code => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn names_uids_and_groups() {
        let list = AllowList::parse(&["root".into(), "12345".into(), "@root".into()]).unwrap();
        assert_eq!(list.uids, [0, 12345]);
        assert!(is_member(0, "root").unwrap());
        assert!(!is_member(12345, "root").unwrap());
        assert!(AllowList::parse(&[]).unwrap().is_empty());
    }

    #[test]
    fn unknown_ones_are_errors() {
        for value in [
            "",
            "@",
            "no-such-user-here",
            "@no-such-group-here",
            "4294967296",
            "-1",
            "a\0b",
        ] {
            let error = AllowList::parse(&[value.to_owned()]).expect_err(value);
            assert!(error.starts_with("--allow-user"), "{value}: {error}");
        }
    }
}
