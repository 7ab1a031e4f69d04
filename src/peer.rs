//! Who is at the other end of a connection, and whether that user is served.

use std::net::SocketAddr;

use tokio::net::TcpStream;

use crate::allow_list::AllowList;
use crate::log;
#[cfg(target_os = "linux")]
use crate::sock_diag::SockDiag;

/// The check that `--allow-user` asks for. It is made once for a connection, before anything is read.
pub struct PeerCheck {
    allowed: AllowList,
    kernel: SockDiag,
}

impl PeerCheck {
    /// The check for a listening socket; none if everybody may come.
    ///
    /// # Errors
    ///
    /// A sentence on why this system can't tell users apart.
    pub fn new(allowed: AllowList, listener: SocketAddr) -> Result<Option<Self>, String> {
        if allowed.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self {
            allowed,
            kernel: SockDiag::new(listener)?,
        }))
    }

    /// The client's uid, where the kernel knows it for certain, and whether that user may come in.
    pub async fn admit(&self, stream: &TcpStream) -> (Option<u32>, bool) {
        match self.kernel.uid(stream) {
            Ok(Some(uid)) => (Some(uid), self.allowed.permits(uid).await),
            Ok(None) => (None, false),
            Err(error) => {
                log::line(format_args!("cannot tell whose a connection is: {error}"));
                (None, false)
            }
        }
    }
}

/// Elsewhere there is no way to ask, and [`AllowList::parse`] has said so.
#[cfg(not(target_os = "linux"))]
enum SockDiag {}

#[cfg(not(target_os = "linux"))]
impl SockDiag {
    fn new(_: SocketAddr) -> Result<Self, String> {
        Err("--allow-user works on Linux only".into())
    }

    fn uid(&self, _: &TcpStream) -> std::io::Result<Option<u32>> {
        match *self {}
    }
}
