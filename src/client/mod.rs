//! The listening socket and client connections. Each request goes to the [`Handler`](crate::exchange::Handler).

mod connection;
mod flush_noting;
pub(crate) mod listener;
