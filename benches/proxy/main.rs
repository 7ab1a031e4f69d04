//! This proxy beside others, on the same machine and in turn: `cargo bench --bench proxy`.
//!
//! Behind `--`, `--help` tells of the flags. Processes are read through Linux's /proc and CPU clocks, so it
//! does nothing elsewhere.

#![allow(clippy::print_stdout, clippy::print_stderr)]

#[cfg(target_os = "linux")]
mod run;

fn main() {
    #[cfg(target_os = "linux")]
    if let Err(error) = run::main() {
        eprintln!("bench: {error}");
        std::process::exit(1);
    }
}
