//! Writes the man page and the shell completions into a directory: `cargo run -p xtask -- DIRECTORY`.

use std::io::{Error, Result};

use clap::CommandFactory;
use clap_complete::Shell;

// The definition alone: building the library would build all of its dependencies.
#[allow(dead_code)]
#[path = "../../src/cli.rs"]
mod cli;

fn main() -> Result<()> {
    let directory = std::env::args_os()
        .nth(1)
        .ok_or_else(|| Error::other("usage: xtask DIRECTORY"))?;
    std::fs::create_dir_all(&directory)?;
    let mut command = cli::Arguments::command();
    let name = command.get_name().to_owned();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, &name, &directory)?;
    }
    clap_mangen::generate_to(command, &directory)
}
