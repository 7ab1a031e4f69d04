//! The main job: OpenAI's Codex CLI, with no key anywhere near it, prints an answer that it streamed through the proxy.
//! Where it isn't installed, a client sends what it sent.

mod support;

use serde_json::{Value, json};
use std::{env, process::Command};
use support::*;

const WORDS: [&str; 6] = ["The ", "key ", "stays ", "with ", "the ", "proxy."];
const QUESTION: &str = "Where does the key stay?";

/// What Codex prints of the answer to the question.
fn run(codex: &str, proxy: &Proxy) -> String {
    let home = Folder::new();
    let mut command = Command::new(codex);
    command.env_clear();
    let url = format!("http://127.0.0.1:{}/v1", proxy.port);
    let provider = format!("{{ name = 'proxy', base_url = '{url}', wire_api = 'responses' }}");
    let launch = Launch::of(command).env("PATH", env::var_os("PATH").unwrap());
    let launch = launch.env("HOME", &*home).env("CODEX_HOME", &*home);
    let launch = launch.args(["exec", "--skip-git-repo-check", QUESTION]);
    let launch = launch.args(["-c", "model_provider=\"proxy\"", "-c"]);
    let launch = launch.arg(format!("model_providers.proxy={provider}"));
    let run = launch.in_folder(&home).input("").finish();
    assert!(run.status.success(), "{run:#?}");
    run.stdout.trim().to_owned()
}

/// Sends what codex-cli 0.169.0 sent, as far as it matters here, and tells the words of the answer.
fn replay(proxy: &Proxy) -> String {
    let mut client = proxy.client();
    let message = json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": QUESTION }] });
    let body = json!({ "model": "any", "input": [message], "stream": true, "store": false });
    let types = "Accept: text/event-stream\r\nContent-Type: application/json\r\n";
    let headers = format!("{types}Originator: codex_exec\r\n");
    let answer = client.ask_with(&headers, body.to_string()).unwrap();
    let answer = String::from_utf8(answer.body).unwrap();
    let lines = answer.lines();
    let data = lines.filter_map(|line| line.strip_prefix("data: ")?.parse::<Value>().ok());
    let delta = |event: Value| event["delta"].as_str().unwrap_or_default().to_owned();
    data.map(delta).collect()
}

#[test]
fn codex_without_a_key_prints_what_it_streamed_through_the_proxy() {
    let (upstream, mut proxy) = serve(|exchange| {
        exchange.body()?;
        exchange.answer_events(&events(&WORDS))
    });
    let printed = match codex() {
        Some(codex) => run(&codex, &proxy),
        None => {
            let why = "no `codex` on PATH, nor named by CODEX: what it sent is replayed";
            skip("running Codex through the proxy", why);
            replay(&proxy)
        }
    };
    assert_eq!(printed, WORDS.concat());
    proxy.wait_for_request("request ", &[" status=200 "]);
    let log = proxy.stop().stderr;
    let refused = log.iter().any(|line| line.starts_with("refused "));
    assert!(!refused, "{log:#?}");
    let seen = upstream.close();
    assert!(!seen.is_empty());
    for seen in seen {
        assert_eq!(seen.head.start, "POST /v1/responses HTTP/1.1");
        assert_eq!(seen.head.all("authorization"), [format!("Bearer {KEY}")]);
        let body: Value = serde_json::from_slice(&seen.body).unwrap();
        assert_eq!(body["stream"], true);
        assert!(body.to_string().contains(QUESTION), "{body}");
    }
}
