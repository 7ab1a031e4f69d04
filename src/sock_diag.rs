//! The kernel's word on whose a loopback connection is.
//!
//! Asked through `NETLINK_SOCK_DIAG` (sock_diag(7)), as `ss -e` does, for the exact four-tuple of the
//! client's end.
#![allow(unsafe_code)]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use tokio::net::TcpStream;

/// Sizes in bytes of what is sent and received (linux/netlink.h, linux/inet_diag.h).
const HEADER: usize = 16;
const REQUEST: usize = HEADER + 56;
const REPLY: usize = HEADER + 72;

/// `SOCK_DIAG_BY_FAMILY` (linux/sock_diag.h).
const BY_FAMILY: u16 = 20;

/// States of a TCP socket (linux/tcp_states.h).
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;

/// How long the kernel may take to answer. It answers before send(2) returns; this only keeps a
/// surprise from holding everybody up.
const REPLY_TIMEOUT: Duration = Duration::from_secs(1);

/// A netlink socket to ask over.
pub struct SockDiag {
    socket: OwnedFd,
}

impl SockDiag {
    /// Opens the socket and tries it on our own listening socket.
    ///
    /// # Errors
    ///
    /// A sentence that says what is missing: a kernel module or leave to use netlink.
    pub fn new(listener: SocketAddr) -> Result<Self, String> {
        let lookup = open().map(|socket| Self { socket }).map_err(|error| {
            format!(
                "--allow-user needs a netlink socket to ask the kernel who a client is, and there is none: \
                 {error}; allow the address family AF_NETLINK"
            )
        })?;
        let any = SocketAddr::new(unspecified(listener.ip()), 0);
        match lookup.ask(listener, any) {
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
    pub fn uid(&self, stream: &TcpStream) -> io::Result<Option<u32>> {
        let found = self.ask(stream.peer_addr()?, stream.local_addr()?)?;
        let Some((ESTABLISHED, uid)) = found else {
            return Ok(None);
        };
        Ok((tcp_state(stream)? == ESTABLISHED).then_some(uid))
    }

    /// State and uid of the socket from `local` to `remote`.
    fn ask(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<(u8, u32)>> {
        let request = request(local, remote);
        // SAFETY: the kernel reads `request.len()` bytes of `request`.
        let sent = unsafe {
            libc::send(
                self.socket.as_raw_fd(),
                request.as_ptr().cast(),
                request.len(),
                0,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut reply = [0; 512];
        // SAFETY: the kernel writes at most `reply.len()` bytes to `reply`.
        let count = unsafe {
            libc::recv(
                self.socket.as_raw_fd(),
                reply.as_mut_ptr().cast(),
                reply.len(),
                0,
            )
        };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        read_reply(&reply[..count], &request)
    }
}

/// The unspecified address of the same family.
fn unspecified(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    }
}

fn open() -> io::Result<OwnedFd> {
    let timeout = libc::timeval {
        tv_sec: REPLY_TIMEOUT.as_secs() as libc::time_t,
        tv_usec: 0,
    };
    // SAFETY: a descriptor that socket(2) gives is owned by nobody else; `timeout` is a timeval and
    // its size is given.
    unsafe {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let size = size_of_val(&timeout) as libc::socklen_t;
        let value = std::ptr::from_ref(&timeout).cast();
        if libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, value, size) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(socket)
    }
}

/// A `struct inet_diag_req_v2` for one TCP socket. Its identity is in bytes 24..60: ports and
/// addresses in network byte order, IPv4 ones in the first four of sixteen bytes.
fn request(local: SocketAddr, remote: SocketAddr) -> [u8; REQUEST] {
    let mut request = [0; REQUEST];
    request[0..4].copy_from_slice(&(REQUEST as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request[16] = if local.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    } as u8;
    request[17] = libc::IPPROTO_TCP as u8;
    // All states: the answer's own is looked at.
    request[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[24..26].copy_from_slice(&local.port().to_be_bytes());
    request[26..28].copy_from_slice(&remote.port().to_be_bytes());
    for (at, address) in [(28, local.ip()), (44, remote.ip())] {
        match address {
            IpAddr::V4(address) => request[at..at + 4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => request[at..at + 16].copy_from_slice(&address.octets()),
        }
    }
    // No cookie: whichever socket there is.
    request[64..72].fill(0xff);
    request
}

/// Takes a `struct inet_diag_msg` apart, or the error in its place.
fn read_reply(reply: &[u8], request: &[u8; REQUEST]) -> io::Result<Option<(u8, u32)>> {
    let number = |at: usize| {
        reply
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .map(i32::from_ne_bytes)
    };
    let kind = reply
        .get(4..6)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u16::from_ne_bytes);
    match kind {
        Some(kind) if kind == libc::NLMSG_ERROR as u16 => {
            match number(HEADER).map(i32::wrapping_neg) {
                Some(libc::ENOENT) => Ok(None),
                Some(code) => Err(io::Error::from_raw_os_error(code)),
                None => Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Some(BY_FAMILY) if reply.len() >= REPLY => {
            let is_the_one = reply[20..24] == request[24..28] || reply[HEADER + 1] == LISTEN;
            let uid = number(80).map(i32::cast_unsigned);
            Ok(uid
                .filter(|_| is_the_one)
                .map(|uid| (reply[HEADER + 1], uid)))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The state of our own end (`TCP_INFO`, tcp(7)), whose first byte it is.
fn tcp_state(stream: &TcpStream) -> io::Result<u8> {
    let mut info = [0_u8; 8];
    let mut size = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `size` bytes to `info`.
    let returned = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut size,
        )
    };
    if returned == 0 {
        Ok(info[0])
    } else {
        Err(io::Error::last_os_error())
    }
}
