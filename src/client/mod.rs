//! What comes in: connections, with who is at their other end. What leaves is one request after the other,
//! for an exchange, and the way a connection is ended.

mod connection;
pub mod listener;
