//! `codex-responses-api-proxy`: a thin shell over the library.

use std::process::ExitCode;

use clap::Parser;
use codex_responses_proxy::cli::{self, Arguments};
use codex_responses_proxy::{hardening, log};

/// The status for a command line that can't be understood, as with clap's own.
const BAD_USAGE: u8 = 2;

fn main() -> ExitCode {
    if let Err(sentence) = hardening::harden() {
        return fail(&sentence, 1);
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if !error.use_stderr() => {
            // Help or version. A reader that is gone is no reason to fail.
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&cli::explain(&error), BAD_USAGE),
    };
    match codex_responses_proxy::run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(sentence) => fail(&sentence, 1),
    }
}

fn fail(sentence: &str, status: u8) -> ExitCode {
    log::line(format_args!("codex-responses-api-proxy: {sentence}"));
    ExitCode::from(status)
}
