//! What systemd and this program have to tell each other: sockets and notices.

use std::io;
use std::os::fd::{FromRawFd, RawFd};

use sd_notify::NotifyState;

use crate::hardening::checked;
use crate::log;

/// Tells systemd, where it wants to know (sd_notify(3)). Without it, the unit will time out, and the
/// log says why.
pub fn tell(state: &NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        log::line(format_args!("cannot notify systemd: {error}"));
    }
}

/// Takes over a socket that was passed to this process (sd_listen_fds(3)).
///
/// # Errors
///
/// It is none that listens, or it listens on more than loopback.
#[allow(unsafe_code)]
pub fn adopt(fd: RawFd) -> io::Result<std::net::TcpListener> {
    let option = |option| -> io::Result<libc::c_int> {
        let mut value = 0;
        let mut size = size_of_val(&value) as libc::socklen_t;
        // SAFETY: the kernel writes at most `size` bytes to `value`.
        let returned = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_SOCKET,
                option,
                std::ptr::from_mut(&mut value).cast(),
                &mut size,
            )
        };
        checked(returned).map(|()| value)
    };
    if option(libc::SO_TYPE)? != libc::SOCK_STREAM || option(libc::SO_ACCEPTCONN)? == 0 {
        return Err(io::Error::other("it is no listening stream socket"));
    }
    // SAFETY: the descriptor is open, as the calls above showed, and by sd_listen_fds(3) it is this
    // process's to use; it is taken once, here.
    let listener = unsafe { std::net::TcpListener::from_raw_fd(fd) };
    if !listener.local_addr()?.ip().is_loopback() {
        return Err(io::Error::other(
            "it listens on more than loopback, where others could use the key",
        ));
    }
    Ok(listener)
}
