//! Queries the kernel for the owner of the other end of a loopback connection, through
//! `NETLINK_SOCK_DIAG` (sock_diag(7)), as `ss -e` does. Only Linux has it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::{AF_INET, AF_INET6, IPPROTO_TCP};
use nix::sys::socket::{self, MsgFlags};
use tokio::net::TcpStream;

/// The size of a netlink header in bytes (linux/netlink.h).
const HEADER: usize = 16;

/// Offsets of `idiag_wqueue`, `idiag_uid` and `idiag_inode` in a reply (linux/inet_diag.h).
const NUMBERS: [usize; 3] = [HEADER + 60, HEADER + 64, HEADER + 68];

/// `NLMSG_ERROR` and `NLM_F_REQUEST` (linux/netlink.h).
const ERROR: &[u8] = &2_u16.to_ne_bytes();
const REQUEST: &[u8] = &1_u16.to_ne_bytes();

/// `SOCK_DIAG_BY_FAMILY` (linux/sock_diag.h).
const BY_FAMILY: &[u8] = &20_u16.to_ne_bytes();

/// States of a TCP socket (linux/tcp_states.h).
const ESTABLISHED: u8 = 1;
const SYN_RECV: u8 = 3;
const LISTEN: u8 = 10;

/// The kernel's report of a socket: its state, how many bytes its peer has not acknowledged, its
/// owner's uid, and its inode, which is 0 while no process has it.
type Report = (u8, u32, u32, u32);

/// A netlink socket for queries.
pub(crate) struct SockDiag(OwnedFd);

impl SockDiag {
    /// Opens the socket and tries it on `listener`, a listening socket of ours. An error says what is
    /// missing: a kernel module or permission to use netlink.
    pub(crate) fn new(listener: SocketAddr) -> Result<Self, String> {
        let kernel = Self(open()?);
        let no_modules = "load the kernel's modules inet_diag and tcp_diag (modprobe tcp_diag)";
        match kernel.listener_uid(listener) {
            Ok(found) => found.map(|_| kernel).ok_or(no_modules.into()),
            Err(error) => Err(format!("the kernel's sock_diag fails: {error}")),
        }
    }

    /// The uid that owns the peer's end of `stream`.
    ///
    /// `None` unless both ends are established: a socket that its process has closed or shut down may
    /// report uid 0, and its four-tuple can be reused by somebody else. Our end is queried last: a
    /// socket never becomes established again, so if it still is, it was when the other end was
    /// queried, and that was its other end.
    ///
    /// A connection that waits to be accepted belongs to nobody yet, and reports uid 0 on older
    /// kernels: its owner is that of the listening socket. While the queue of those is full, its state
    /// is still SYN_RECV.
    pub(crate) fn peer_uid(&self, stream: &TcpStream) -> io::Result<Option<u32>> {
        let (ours, theirs) = (stream.local_addr()?, stream.peer_addr()?);
        let uid = match self.query(theirs, ours)? {
            Some((ESTABLISHED, _, uid, 1..)) => Some(uid),
            Some((ESTABLISHED | SYN_RECV, ..)) => self.listener_uid(theirs)?,
            _ => None,
        };
        let is_ours = matches!(self.query(ours, theirs)?, Some((ESTABLISHED, ..)));
        Ok(uid.filter(|_| is_ours))
    }

    /// How many bytes written to `stream` its peer has not acknowledged.
    pub(crate) fn unacknowledged(&self, stream: &TcpStream) -> io::Result<u32> {
        let report = self.query(stream.local_addr()?, stream.peer_addr()?)?;
        Ok(report.map_or(0, |(_, bytes, ..)| bytes))
    }

    /// The uid that owns the socket that listens at `address` or at all addresses.
    fn listener_uid(&self, address: SocketAddr) -> io::Result<Option<u32>> {
        // The kernel looks for a listening socket where none is connected to port 0.
        let found = self.query(address, SocketAddr::new(address.ip(), 0))?;
        Ok(found.and_then(|(state, _, uid, _)| (state == LISTEN).then_some(uid)))
    }

    /// The socket from `local` to `remote`.
    fn query(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<Report>> {
        let fd = self.0.as_raw_fd();
        socket::send(fd, &encode_query(local, remote), MsgFlags::empty())?;
        let mut reply = [0; 512];
        // The kernel has replied before send(2) returns, so there is nothing to wait for.
        let count = socket::recv(fd, &mut reply, MsgFlags::MSG_DONTWAIT)?;
        decode_reply(&reply[..count])
    }
}

#[cfg(target_os = "linux")]
fn open() -> Result<OwnedFd, String> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType};
    let (flags, protocol) = (SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag);
    let socket = socket::socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol);
    socket.map_err(|error| format!("no netlink socket: {error}; allow the family AF_NETLINK"))
}

#[cfg(not(target_os = "linux"))]
fn open() -> Result<OwnedFd, String> {
    Err("only Linux reports the owner of a connection".into())
}

/// A netlink header and a `struct inet_diag_req_v2` for one TCP socket. Its identity is in bytes 24..60:
/// ports and addresses in network byte order, IPv4 ones in the first four of sixteen bytes.
fn encode_query(local: SocketAddr, remote: SocketAddr) -> Vec<u8> {
    let family = if local.is_ipv4() { AF_INET } else { AF_INET6 };
    let address = |end: SocketAddr| match end.ip() {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96).to_be_bytes(),
        IpAddr::V6(address) => address.octets(),
    };
    [
        // The size of both.
        &(HEADER as u32 + 56).to_ne_bytes()[..],
        BY_FAMILY,
        REQUEST,
        &[0; 8],
        &[family as u8, IPPROTO_TCP as u8, 0, 0],
        // All states: the caller looks at the reply's.
        &u32::MAX.to_ne_bytes(),
        &[local.port().to_be_bytes(), remote.port().to_be_bytes()].concat(),
        &[address(local), address(remote)].concat(),
        &[0; 4],
        // No cookie: any socket of that identity.
        &[0xff; 8],
    ]
    .concat()
}

/// Decodes a `struct inet_diag_msg`, or the error in place of it.
fn decode_reply(reply: &[u8]) -> io::Result<Option<Report>> {
    let word = |at: usize| Some(u32::from_ne_bytes(*reply.get(at..)?.first_chunk()?));
    match (reply.get(4..6), word(HEADER), NUMBERS.map(word)) {
        (Some(BY_FAMILY), _, [Some(bytes), Some(uid), Some(inode)]) => {
            Ok(Some((reply[HEADER + 1], bytes, uid, inode)))
        }
        (Some(ERROR), Some(code), _) => match Errno::from_raw(code.cast_signed().wrapping_neg()) {
            Errno::ENOENT => Ok(None),
            error => Err(error.into()),
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
