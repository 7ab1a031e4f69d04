//! Lets unprivileged users run Codex without holding the OpenAI API key.
//!
//! The program reads the key from stdin, listens on loopback, and forwards `POST /v1/responses` with
//! the key added. Its modules; data goes down, and comes back as a response's body:
//!
//! | module | holds |
//! | --- | --- |
//! | `client` | the listening socket, admission, client connections |
//! | `exchange` | one request: the filter, headers, bodies, tunnels, dumps, the log entry |
//! | `upstream` | the target, connecting, adding the credential, pooled connections |
//! | [`key`] | the credential: read once, in a page of its own |
//!
//! `server` connects them. The others are what every program needs, and import nothing from these four but
//! `key::environment`.

#[macro_use]
mod log;

pub mod cli;
mod client;
mod error;
mod exchange;
mod hardening;
mod joining_stream;
pub mod key;
mod limits;
mod peer;
#[cfg(target_os = "linux")]
mod privileges;
mod server;
mod server_info;
mod shutdown;
mod sock_diag;
mod upstream;

use std::{ffi::OsString, process::ExitCode};

use clap::Parser;

use crate::{cli::Arguments, key::Credential, server::Server};

/// The program: hardens the process, reads the command line (its first item is the program's name) and
/// runs the proxy. To be called first of all in a process.
///
/// Status 0 after a graceful shutdown, 2 for an invalid command line and 1 for any other error, with one
/// line on stderr.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed = hardening::harden().map(|()| Arguments::try_parse_from(arguments));
    let (status, message) = match parsed {
        Ok(Ok(arguments)) => match run(&arguments) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(message) => (1, message),
        },
        // Help or version. A reader that is gone is no reason to fail.
        Ok(Err(help)) if !help.use_stderr() => help.exit(),
        // As with clap's own messages.
        Ok(Err(error)) => (2, cli::explain(&error)),
        Err(message) => (1, message),
    };
    log!("codex-responses-api-proxy: {message}");
    ExitCode::from(status)
}

/// Runs the proxy until it shuts down. Everything that can be wrong without the key is found before the
/// key is read. An error is one message that says what to do, and never contains the key.
fn run(arguments: &Arguments) -> Result<(), String> {
    let server = Server::prepare(arguments)?;
    let credential = Credential::from_stdin(server.key_rule())?;
    server.serve(credential)
}
