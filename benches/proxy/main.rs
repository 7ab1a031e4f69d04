//! Compares this proxy with others on the same machine: `cargo bench --bench proxy`.
//!
//! `cargo bench --bench proxy -- --help` lists the options. Linux only: the proxies' CPU time comes from the
//! kernel's CPU clocks, their memory from /proc.

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
