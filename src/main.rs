//! `codex-responses-api-proxy`: a thin shell over the library.
fn main() {}
