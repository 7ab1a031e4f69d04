//! The listening socket and client connections. Each request goes to the [`Handler`](crate::exchange::Handler).

mod connection;
pub(crate) mod listener;
