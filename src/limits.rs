//! Limits of both sides' HTTP.

/// The largest head of a request or response, and the most of a body in one of hyper's buffers, in bytes.
pub(crate) const MAX_HEAD_BYTES: usize = 64 << 10;

/// The most interim responses (1xx) to a request.
pub(crate) const MAX_INTERIM: u32 = 32;

/// The most headers in a head.
pub(crate) const MAX_HEADERS: usize = 128;
