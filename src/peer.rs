//! The users allowed at the other end of a connection: of clients with `--allow-user`, of a plain
//! upstream with `--upstream-user`.

use std::{collections::HashMap, net::SocketAddr, time::Duration};

use nix::unistd::{Group, Uid, User};
use tokio::{net::TcpStream, sync::Mutex, time::Instant};

use crate::sock_diag::SockDiag;

/// How long a group membership is cached. The group database may be on the network, so it isn't
/// queried for each connection.
const MEMBERSHIP_TTL: Duration = Duration::from_secs(1);

/// The check of a connection's other end, made once, before anything is read or sent.
pub(crate) struct PeerCheck {
    uids: Vec<u32>,
    groups: Vec<String>,
    kernel: SockDiag,
    /// Whether users are in one of the groups, and when that was looked up. Locked meanwhile, so that
    /// many connections of a user are one look-up.
    members: Mutex<HashMap<u32, (bool, Instant)>>,
}

impl PeerCheck {
    /// The check for the values of `flag`: a name, a uid, or `@` and a group's name. `listener` is a
    /// listening socket of ours to try the kernel with.
    pub(crate) fn new(flag: &str, values: &[String], listener: SocketAddr) -> Result<Self, String> {
        let (uids, groups) = parse_allow_list(flag, values)?;
        let failed = |error| format!("{flag} needs the kernel to identify users: {error}");
        Ok(Self {
            uids,
            groups,
            kernel: SockDiag::new(listener).map_err(failed)?,
            members: Mutex::default(),
        })
    }

    /// The peer's uid, where the kernel knows it for certain, and whether that user is allowed.
    pub(crate) async fn identify(&self, stream: &TcpStream) -> (Option<u32>, bool) {
        let uid = self.kernel.peer_uid(stream).unwrap_or_else(|error| {
            log!("cannot identify the user of a connection: {error}");
            None
        });
        let is_allowed = match uid {
            Some(uid) if self.uids.contains(&uid) => true,
            Some(uid) => !self.groups.is_empty() && self.is_member(uid).await,
            None => false,
        };
        (uid, is_allowed)
    }

    /// Whether the user is in one of the groups.
    async fn is_member(&self, uid: u32) -> bool {
        let mut members = self.members.lock().await;
        members.retain(|_, (_, since)| since.elapsed() < MEMBERSHIP_TTL);
        if let Some((is_member, _)) = members.get(&uid) {
            return *is_member;
        }
        let mut groups = self.groups.clone().into_iter();
        let lookup = move || groups.any(|group| is_group_member(uid, &group) == Some(true));
        // On a thread of its own, since it may take long.
        let is_member = tokio::task::spawn_blocking(lookup).await.unwrap_or(false);
        members.insert(uid, (is_member, Instant::now()));
        is_member
    }
}

/// The uids and groups that these values name.
fn parse_allow_list(flag: &str, values: &[String]) -> Result<(Vec<u32>, Vec<String>), String> {
    let (mut uids, mut groups) = (Vec::new(), Vec::new());
    for value in values {
        let unknown = |what| format!("{flag} {value:?}: there is no such {what} on this system");
        let failed = |error| format!("{flag} {value:?} cannot be looked up: {error}");
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

/// Whether the user is in the group, be it the user's primary group or another; `None` if there is no such
/// user or group, or they can't be looked up.
fn is_group_member(uid: u32, group: &str) -> Option<bool> {
    let user = User::from_uid(Uid::from_raw(uid)).ok()??;
    let group = Group::from_name(group).ok()??;
    #[cfg(target_os = "linux")]
    let gids =
        nix::unistd::getgrouplist(&std::ffi::CString::new(user.name).ok()?, user.gid).ok()?;
    #[cfg(not(target_os = "linux"))]
    let gids = [user.gid];
    Some(gids.contains(&group.gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_uids_and_groups_are_found() {
        let values = ["root", "12345", "@root"].map(String::from);
        let expected = (vec![0, 12345], vec!["root".into()]);
        assert_eq!(parse_allow_list("--allow-user", &values), Ok(expected));
        assert_eq!(is_group_member(0, "root"), Some(true));
        assert_eq!(is_group_member(12345, "root"), None);
    }

    #[test]
    fn unknown_users_and_groups_are_errors() {
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
            let error = parse_allow_list("--allow-user", &[value.to_owned()]).expect_err(value);
            assert!(error.starts_with("--allow-user"), "{value}: {error}");
        }
    }
}
