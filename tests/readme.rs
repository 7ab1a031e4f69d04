//! The README shows the program's real help text.

mod support;

use std::{fs, process::Command};
use support::*;

#[test]
fn readme_shows_the_help_text() {
    // Nix builds without it, so that a change of the README rebuilds nothing.
    let Ok(readme) = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")) else {
        return skip("the README's options", "there is no README.md");
    };
    let start = "<!-- help -->\n```text\n";
    let end = "```\n<!-- /help -->";
    let block = readme
        .split_once(start)
        .and_then(|(_, rest)| rest.split_once(end));
    let (block, _) = block.expect("a block between the markers");
    let output = Command::new(PROGRAM).arg("--help").output().unwrap();
    let help = String::from_utf8(output.stdout).unwrap();
    assert_eq!(block, help);
}
