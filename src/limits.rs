//! What both sides of HTTP agree on.

/// The largest head of a request or an answer, in bytes; also what is buffered of a body.
pub(crate) const MAX_HEAD_BYTES: usize = 64 << 10;

/// The most interim responses (1xx) to a request.
pub(crate) const MAX_INTERIM: u32 = 32;

/// The most headers in a head.
pub(crate) const MAX_HEADERS: usize = 128;
