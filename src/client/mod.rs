//! What comes in: connections, with who is at their other end. What leaves is one request after the other,
//! for an exchange, and the way a connection is ended.

mod connection;
pub mod listener;
#[cfg_attr(not(target_os = "linux"), path = "unknown_peer.rs")]
pub mod peer;
#[cfg(target_os = "linux")]
mod sock_diag;
