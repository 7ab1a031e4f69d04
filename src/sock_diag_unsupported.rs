//! Only Linux reports who owns the other end of a connection.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpStream;

/// There is no such query here.
pub enum SockDiag {}

impl SockDiag {
    /// Always an error.
    ///
    /// # Errors
    ///
    /// A phrase that says so.
    pub fn new(_: SocketAddr) -> Result<Self, String> {
        Err("only Linux reports the owner of a connection".into())
    }

    /// Never called.
    ///
    /// # Errors
    ///
    /// None.
    pub fn unacknowledged(&self, _: &TcpStream) -> io::Result<u32> {
        match *self {}
    }

    /// Never called.
    ///
    /// # Errors
    ///
    /// None.
    pub fn peer_uid(&self, _: &TcpStream) -> io::Result<Option<u32>> {
        match *self {}
    }
}
