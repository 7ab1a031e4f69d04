//! Which users may be at the other end of a connection: `--allow-user` of a client's, `--upstream-user` of
//! one to a plain upstream.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use nix::unistd::{Group, Uid, User};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::log;
use crate::sock_diag::SockDiag;

/// How long what the group database says of a user is relied on. It may be somewhere on the network, so
/// it isn't asked for each connection.
const MEMBERSHIP_VALID: Duration = Duration::from_secs(1);

/// The check of a connection's other end, made once, before anything is read or sent.
pub struct PeerCheck {
    uids: Vec<u32>,
    groups: Vec<String>,
    kernel: SockDiag,
    /// Whether users are in one of the groups, and when that was looked up. Locked meanwhile, so that
    /// many connections of a user are one look-up.
    members: Mutex<HashMap<u32, (bool, Instant)>>,
}

impl PeerCheck {
    /// The check for the values of `flag`: a name, a uid or `@` and a group's name. `None` without a
    /// value: everyone is allowed. `listener` is a listening socket of ours to try the kernel with.
    ///
    /// # Errors
    ///
    /// A sentence naming what this system doesn't know, or why it can't tell users apart.
    pub fn new(
        flag: &str,
        values: &[String],
        listener: SocketAddr,
    ) -> Result<Option<Self>, String> {
        let (uids, groups) = named(flag, values)?;
        if values.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            uids,
            groups,
            kernel: SockDiag::new(listener)
                .map_err(|error| format!("{flag} needs the kernel to identify users: {error}"))?,
            members: Mutex::default(),
        }))
    }

    /// The peer's uid, where the kernel knows it for certain, and whether that user is allowed.
    pub async fn identify(&self, stream: &TcpStream) -> (Option<u32>, bool) {
        let uid = self.kernel.peer_uid(stream).unwrap_or_else(|error| {
            log::line(format_args!("cannot tell whose a connection is: {error}"));
            None
        });
        let is_allowed = match uid {
            Some(uid) => self.uids.contains(&uid) || self.is_member(uid).await,
            None => false,
        };
        (uid, is_allowed)
    }

    async fn is_member(&self, uid: u32) -> bool {
        if self.groups.is_empty() {
            return false;
        }
        let mut members = self.members.lock().await;
        members.retain(|_, (_, since)| since.elapsed() < MEMBERSHIP_VALID);
        if let Some((is_member, _)) = members.get(&uid) {
            return *is_member;
        }
        // On a thread of its own, since the answer may be long in coming.
        let groups = self.groups.clone();
        let lookup = move || {
            groups
                .iter()
                .any(|group| is_in(uid, group).unwrap_or(false))
        };
        let is_member = tokio::task::spawn_blocking(lookup).await.unwrap_or(false);
        members.insert(uid, (is_member, Instant::now()));
        is_member
    }
}

/// The uids and groups that these values name.
fn named(flag: &str, values: &[String]) -> Result<(Vec<u32>, Vec<String>), String> {
    let (mut uids, mut groups) = (Vec::new(), Vec::new());
    for value in values {
        let unknown = |what| format!("{flag} {value:?}: there is no such {what} on this system");
        let failed = |error| format!("{flag} {value:?} can't be looked up: {error}");
        if let Some(group) = value.strip_prefix('@') {
            let group = Group::from_name(group).map_err(failed)?;
            groups.push(group.ok_or_else(|| unknown("group"))?.name);
        } else if value.starts_with(|first: char| first.is_ascii_digit()) {
            uids.push(value.parse().map_err(|_| unknown("uid"))?);
        } else {
            let user = User::from_name(value).map_err(failed)?;
            uids.push(user.ok_or_else(|| unknown("user"))?.uid.as_raw());
        }
    }
    Ok((uids, groups))
}

/// Whether the user is in the group, as its primary one or another.
fn is_in(uid: u32, group: &str) -> nix::Result<bool> {
    let user = User::from_uid(Uid::from_raw(uid))?;
    let (Some(user), Some(group)) = (user, Group::from_name(group)?) else {
        return Ok(false);
    };
    #[cfg(target_os = "linux")]
    if let Ok(name) = std::ffi::CString::new(user.name) {
        return Ok(nix::unistd::getgrouplist(&name, user.gid)?.contains(&group.gid));
    }
    Ok(user.gid == group.gid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_uids_and_groups() {
        let values = ["root", "12345", "@root"].map(String::from);
        assert_eq!(
            named("--allow-user", &values),
            Ok((vec![0, 12345], vec!["root".into()]))
        );
        assert_eq!(is_in(0, "root"), Ok(true));
        assert_eq!(is_in(12345, "root"), Ok(false));
    }

    #[test]
    fn unknown_ones_are_errors() {
        for value in [
            "",
            "@",
            "no-such-user-here",
            "@no-such-group-here",
            "4294967296",
            "1x",
            "-1",
            "a\0b",
        ] {
            let error = named("--allow-user", &[value.to_owned()]).expect_err(value);
            assert!(error.starts_with("--allow-user"), "{value}: {error}");
        }
    }
}
