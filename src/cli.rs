//! The command line.

use std::path::PathBuf;

use clap::Parser;
use clap::error::{ContextKind, ErrorKind};

/// Lets unprivileged users run Codex without holding the OpenAI API key.
///
/// Reads the key from stdin, listens on loopback, and forwards POST /v1/responses, and nothing else, to
/// the Responses API with the key added.
#[derive(Debug, Parser)]
#[command(name = "codex-responses-api-proxy", version)]
pub struct Arguments {
    /// Port to listen on at 127.0.0.1 [default: chosen by the system]
    #[arg(long)]
    pub port: Option<u16>,

    /// File for one line of JSON, {"port":…,"pid":…}: written once listening, removed when shutdown starts
    #[arg(long, value_name = "FILE")]
    pub server_info: Option<PathBuf>,

    /// Shut down on GET /shutdown
    #[arg(long)]
    pub http_shutdown: bool,

    /// Also forward WebSocket handshakes on GET /v1/responses
    #[arg(long)]
    pub websocket: bool,

    /// Absolute URL that requests are forwarded to
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://api.openai.com/v1/responses"
    )]
    pub upstream_url: String,

    /// PEM file of certificates to trust in addition to the built-in roots [default:
    /// $CODEX_CA_CERTIFICATE, then $SSL_CERT_FILE]
    #[arg(long, value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,

    /// Owner of a plain http:// upstream, in addition to root and the user who starts the proxy (Linux only)
    #[arg(long, value_name = "NAME|UID|@GROUP")]
    pub upstream_user: Option<String>,

    /// Serve only this local user: name, UID or @GROUP (repeatable; Linux only)
    #[arg(long, value_name = "NAME|UID|@GROUP")]
    pub allow_user: Option<Vec<String>>,

    /// Directory for request and response dumps as JSON (contains prompts)
    #[arg(long, value_name = "DIR")]
    pub dump_dir: Option<PathBuf>,
}

/// A message about an invalid command line.
///
/// clap's own repeats what was given, which may be a key that someone took for an argument.
pub fn explain(error: &clap::Error) -> String {
    // For all kinds of errors except `UnknownArgument`, this is one of our flags.
    match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, _) => match error.get(ContextKind::SuggestedArg) {
            Some(suggestion) => format!("unknown flag: did you mean {suggestion}?"),
            None => "unknown flag or argument; the key is read from stdin, never from an argument: see --help".into(),
        },
        (ErrorKind::ArgumentConflict, Some(flag)) => format!("{flag} is repeated: see --help"),
        (ErrorKind::TooManyValues, Some(flag)) => format!("{flag} takes no value: see --help"),
        (ErrorKind::InvalidValue | ErrorKind::ValueValidation, Some(flag)) => {
            format!("{flag} has no value or an invalid one: see --help")
        }
        _ => "the command line is invalid: see --help".into(),
    }
}
