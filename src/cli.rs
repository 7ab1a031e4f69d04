//! The command line.

use std::path::PathBuf;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Lets unprivileged users run Codex without holding the OpenAI API key.
///
/// Reads the key from stdin, listens on loopback, and forwards POST /v1/responses, and nothing else,
/// to the Responses API with the key added.
#[derive(Debug, Parser)]
#[command(name = "codex-responses-api-proxy", version)]
pub struct Arguments {
    /// Port on 127.0.0.1 to listen on; without it the system picks one
    #[arg(long)]
    pub port: Option<u16>,

    /// File to write {"port":…,"pid":…} to once listening, one line of JSON; removed when shutdown starts
    #[arg(long, value_name = "FILE")]
    pub server_info: Option<PathBuf>,

    /// Let GET /shutdown end the process with status 0
    #[arg(long)]
    pub http_shutdown: bool,

    /// Absolute URL to forward requests to
    #[arg(
        long,
        value_name = "URL",
        default_value = "https://api.openai.com/v1/responses"
    )]
    pub upstream_url: String,

    /// PEM file with certificates to trust for the upstream in addition to the built-in roots; else
    /// CODEX_CA_CERTIFICATE, else SSL_CERT_FILE
    #[arg(long, value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,

    /// Also forward WebSocket handshakes on GET /v1/responses
    #[arg(long)]
    pub websocket: bool,

    /// Owner of a plain http:// upstream, besides root and the user who starts this (Linux)
    #[arg(long, value_name = "NAME|UID|@GROUP")]
    pub upstream_user: Option<String>,

    /// Local user to serve, nobody else then: a name, a uid or @ and a group (Linux; repeatable)
    #[arg(long, value_name = "NAME|UID|@GROUP")]
    pub allow_user: Vec<String>,

    /// Folder to write each request and answer to, as JSON files: they hold prompts
    #[arg(long, value_name = "DIR")]
    pub dump_dir: Option<PathBuf>,
}

/// A sentence on what is wrong with the command line.
///
/// clap's own words repeat what was given, which may be a key that someone took for an argument.
#[must_use]
pub fn explain(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        Some(ContextValue::Strings(texts)) => texts.first().map(String::as_str),
        _ => None,
    };
    // Of all kinds but an unknown one, the argument is a flag of ours.
    let flag = context(ContextKind::InvalidArg).unwrap_or("the command line");
    let what = match error.kind() {
        ErrorKind::ArgumentConflict => "is given more than once",
        ErrorKind::InvalidValue | ErrorKind::ValueValidation | ErrorKind::NoEquals => {
            "has no value or one that can't be used"
        }
        ErrorKind::TooManyValues => "takes no value",
        ErrorKind::UnknownArgument => {
            return match context(ContextKind::SuggestedArg) {
                Some(suggestion) => format!("unknown flag: did you mean {suggestion}?"),
                None => "unknown flag or argument; the key is given on stdin and never as an argument: see --help".into(),
            };
        }
        _ => return "the command line can't be understood: see --help".into(),
    };
    format!("{flag} {what}: see --help")
}
