//! `codex-responses-api-proxy`: a thin shell over the library.

fn main() -> std::process::ExitCode {
    codex_responses_proxy::main(std::env::args_os())
}
