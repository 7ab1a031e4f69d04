//! The kernel's word on whose a loopback connection is.
//!
//! Asked through `NETLINK_SOCK_DIAG` (sock_diag(7)), as `ss -e` does, for the exact four-tuple of the
//! client's end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket,
};
use tokio::net::TcpStream;

/// Sizes in bytes of what is sent and received (linux/netlink.h, linux/inet_diag.h).
const HEADER: usize = 16;
const REQUEST: usize = HEADER + 56;

/// Where in a reply the uid is (linux/inet_diag.h, `idiag_uid`).
const UID: usize = HEADER + 64;

/// `NLMSG_ERROR` (linux/netlink.h).
const ERROR: u16 = 2;

/// `SOCK_DIAG_BY_FAMILY` (linux/sock_diag.h).
const BY_FAMILY: u16 = 20;

/// States of a TCP socket (linux/tcp_states.h).
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// A netlink socket to ask over.
pub(super) struct SockDiag(OwnedFd);

impl SockDiag {
    /// Opens the socket and tries it on our own listening socket.
    ///
    /// # Errors
    ///
    /// A sentence that says what is missing: a kernel module or leave to use netlink.
    pub(super) fn new(listener: SocketAddr) -> Result<Self, String> {
        let open = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        );
        let lookup = Self(open.map_err(|error| {
            format!(
                "--allow-user needs a netlink socket to ask the kernel who a client is, and there is none: \
                 {error}; allow the address family AF_NETLINK"
            )
        })?);
        match lookup.ask(listener, SocketAddr::new(listener.ip(), 0)) {
            Ok(Some((LISTEN, _))) => Ok(lookup),
            Ok(_) => Err(
                "--allow-user needs the kernel to tell whose connection is whose, and it can't: \
                          load its modules inet_diag and tcp_diag (modprobe tcp_diag)"
                    .into(),
            ),
            Err(error) => Err(format!(
                "--allow-user needs the kernel's sock_diag, which fails: {error}"
            )),
        }
    }

    /// The uid that owns the client's end of `stream`.
    ///
    /// `None` unless both ends are established: a socket that its process has closed or shut down
    /// may report uid 0, and a four-tuple that was let go can be taken by somebody else. Our end is
    /// looked at last: a socket never becomes established again, so if it still is, it was when the
    /// other end was looked up, and that was its other end.
    ///
    /// # Errors
    ///
    /// What netlink or the stream says.
    pub(super) fn uid(&self, stream: &TcpStream) -> io::Result<Option<u32>> {
        let (ours, theirs) = (stream.local_addr()?, stream.peer_addr()?);
        let Some((ESTABLISHED, uid)) = self.ask(theirs, ours)? else {
            return Ok(None);
        };
        let ours = self.ask(ours, theirs)?;
        Ok(ours.and_then(|(state, _)| (state == ESTABLISHED).then_some(uid)))
    }

    /// State and uid of the socket from `local` to `remote`.
    fn ask(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<(u8, u32)>> {
        let request = request(local, remote);
        send(self.0.as_raw_fd(), &request, MsgFlags::empty())?;
        let mut reply = [0; 512];
        // The kernel has answered before send(2) returns, so there is nothing to wait for.
        let count = recv(self.0.as_raw_fd(), &mut reply, MsgFlags::MSG_DONTWAIT)?;
        read_reply(&reply[..count])
    }
}

/// A netlink header and a `struct inet_diag_req_v2` for one TCP socket. Its identity is in bytes 24..60:
/// ports and addresses in network byte order, IPv4 ones in the first four of sixteen bytes.
fn request(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let family = match local {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    let address = |address: IpAddr| match address {
        IpAddr::V4(address) => [&address.octets()[..], &[0; 12]].concat(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let parts: [&[u8]; 10] = [
        &(REQUEST as u32).to_ne_bytes(),
        &BY_FAMILY.to_ne_bytes(),
        &(libc::NLM_F_REQUEST as u16).to_ne_bytes(),
        &[0; 8],
        &[family as u8, libc::IPPROTO_TCP as u8, 0, 0],
        // All states: the answer's own is looked at.
        &u32::MAX.to_ne_bytes(),
        &[local.port().to_be_bytes(), remote.port().to_be_bytes()].concat(),
        &[address(local.ip()), address(remote.ip())].concat(),
        &[0; 4],
        // No cookie: whichever socket there is.
        &[0xff; 8],
    ];
    parts.concat()
}

/// Takes a `struct inet_diag_msg` apart, or the error in its place.
fn read_reply(reply: &[u8]) -> io::Result<Option<(u8, u32)>> {
    let word = |at: usize| {
        reply
            .get(at..)?
            .first_chunk()
            .copied()
            .map(u32::from_ne_bytes)
    };
    let kind = reply.get(4..).and_then(|rest| rest.first_chunk().copied());
    match (kind.map(u16::from_ne_bytes), word(HEADER), word(UID)) {
        (Some(BY_FAMILY), Some(_), Some(uid)) => Ok(Some((reply[HEADER + 1], uid))),
        (Some(ERROR), Some(code), _) => match Errno::from_raw(code.cast_signed().wrapping_neg()) {
            Errno::ENOENT => Ok(None),
            error => Err(error.into()),
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
