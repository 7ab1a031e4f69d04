//! Stands for `sock_diag` on other systems: only Linux reports the owner of a connection.

use std::{io, net::SocketAddr};

use tokio::net::TcpStream;

/// Never created.
pub(crate) enum SockDiag {}

impl SockDiag {
    pub(crate) fn new(_: SocketAddr) -> Result<Self, String> {
        Err("only Linux reports the owner of a connection".into())
    }

    pub(crate) fn unacknowledged(&self, _: &TcpStream) -> io::Result<u32> {
        match *self {}
    }

    pub(crate) fn peer_uid(&self, _: &TcpStream) -> io::Result<Option<u32>> {
        match *self {}
    }
}
