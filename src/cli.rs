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

    /// File to write {"port":…,"pid":…} to once listening, one line of JSON
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

    /// PEM file with certificates to trust for the upstream beside the built-in roots
    #[arg(long, value_name = "FILE")]
    pub upstream_ca: Option<PathBuf>,

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
    let help = "see --help";
    let flag = context(ContextKind::InvalidArg).filter(|flag| is_known(flag));
    match (error.kind(), flag) {
        (ErrorKind::ArgumentConflict, Some(flag)) => {
            format!("{flag} is given more than once: {help}")
        }
        (
            ErrorKind::InvalidValue | ErrorKind::ValueValidation | ErrorKind::NoEquals,
            Some(flag),
        ) => {
            format!("{flag} has no value or one that can't be used: {help}")
        }
        (ErrorKind::TooManyValues, Some(flag)) => format!("{flag} takes no value: {help}"),
        (ErrorKind::UnknownArgument, _) => match context(ContextKind::SuggestedArg) {
            Some(suggestion) => format!("unknown flag: did you mean {suggestion}?"),
            None => format!(
                "unknown flag or argument; the key is given on stdin and never as an argument: {help}"
            ),
        },
        _ => format!("the command line can't be understood: {help}"),
    }
}

/// Whether a text that clap gives is one of our flags, with or without its value's name.
fn is_known(flag: &str) -> bool {
    use clap::CommandFactory;
    let name = flag
        .split([' ', '='])
        .next()
        .unwrap_or_default()
        .trim_start_matches('-');
    Arguments::command()
        .get_arguments()
        .any(|argument| argument.get_long() == Some(name))
}
