//! The main job: OpenAI's Codex CLI, with no key anywhere near it, prints an answer that it streamed through the proxy.

mod support;

use serde_json::json;
use std::process::Command;
use support::{
    Folder, codex,
    proxy::{KEY, Launch},
    skip,
    upstream::Upstream,
};

const WORDS: [&str; 6] = ["The ", "key ", "stays ", "with ", "the ", "proxy."];

/// The events of an answer with these words, as the Responses API sends them.
fn events() -> Vec<String> {
    let text = WORDS.concat();
    let message = |content| json!({ "type": "message", "id": "msg_1", "role": "assistant", "content": content });
    let whole = message(json!([{ "type": "output_text", "text": text, "annotations": [] }]));
    let mut events = vec![
        json!({ "type": "response.created", "response": { "id": "resp_1" } }),
        json!({ "type": "response.output_item.added", "output_index": 0, "item": message(json!([])) }),
    ];
    events.extend(WORDS.map(|word| json!({
        "type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": word,
    })));
    events.push(json!({ "type": "response.output_item.done", "output_index": 0, "item": whole }));
    events.push(json!({
        "type": "response.completed",
        "response": {
            "id": "resp_1",
            "usage": {
                "input_tokens": 7,
                "input_tokens_details": { "cached_tokens": 0 },
                "output_tokens": 6,
                "output_tokens_details": { "reasoning_tokens": 0 },
                "total_tokens": 13,
            },
        },
    }));
    let line = |event: serde_json::Value| {
        format!(
            "event: {}\ndata: {event}\n\n",
            event["type"].as_str().unwrap()
        )
    };
    events.into_iter().map(line).collect()
}

#[test]
fn codex_without_a_key_prints_what_it_streamed_through_the_proxy() {
    let Some(codex) = codex() else {
        return skip(
            "running Codex through the proxy",
            "no `codex` on PATH, nor named by CODEX",
        );
    };
    let upstream = Upstream::start(|exchange| {
        exchange.body()?;
        exchange.begin_events()?;
        for event in events() {
            exchange.chunk(&event)?;
        }
        exchange.chunk("")
    });
    let mut proxy = Launch::to(&upstream).start();

    let home = Folder::new();
    let provider = format!(
        "model_providers.proxy={{ name = \"proxy\", base_url = \"http://127.0.0.1:{}/v1\", wire_api = \"responses\" }}",
        proxy.port
    );
    let mut command = Command::new(codex);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap());
    command
        .env("HOME", home.path())
        .env("CODEX_HOME", home.path())
        .current_dir(home.path());
    let run = Launch::of(command)
        .args([
            "exec",
            "--skip-git-repo-check",
            "-c",
            "model_provider=\"proxy\"",
            "-c",
            &provider,
        ])
        .arg("Where does the key stay?")
        .input("")
        .finish();

    assert!(run.status.success(), "{run:#?}");
    assert_eq!(run.stdout.trim(), WORDS.concat(), "{run:#?}");
    let line =
        proxy.wait_for_line(|line| line.starts_with("request ") || line.starts_with("refused "));
    assert!(line.contains(" status=200 "), "{line}");
    let log = proxy.stop().stderr;
    assert!(
        !log.iter().any(|line| line.starts_with("refused ")),
        "{log:#?}"
    );
    let seen = upstream.close();
    assert!(!seen.is_empty());
    for seen in seen {
        assert_eq!(seen.head.start, "POST /v1/responses HTTP/1.1");
        assert_eq!(seen.head.all("authorization"), [format!("Bearer {KEY}")]);
        let body: serde_json::Value = serde_json::from_slice(&seen.body).unwrap();
        assert_eq!(body["stream"], true);
        assert!(
            body.to_string().contains("Where does the key stay?"),
            "{body}"
        );
    }
}
