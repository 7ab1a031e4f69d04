//! Demonstrates the proxy without an account and without the internet.
//!
//! A stand-in for the Responses API listens on loopback with TLS. The proxy in front of it reads a made-up key from
//! stdin. The demo sends requests without a key, as an agent would: by POST and over a WebSocket.
//!
//! Run it with `cargo run --example demo`.
#![allow(clippy::print_stdout)]

// Shared with the tests, which use more of it.
#[allow(dead_code)]
#[path = "../tests/support/client.rs"]
mod client;
#[allow(dead_code)]
#[path = "../tests/support/http.rs"]
mod http;
#[allow(dead_code)]
#[path = "../tests/support/upstream.rs"]
mod upstream;

use client::Client;
use serde_json::{Value, json};
use std::error::Error;
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;
use tungstenite::Message;
use upstream::{TestDir, Upstream, UpstreamRequest, events, next_request};

/// With this as the first argument, the demo runs the proxy, so it needs no other executable.
const RUN_PROXY: &str = "run-proxy";

/// An invented key.
const KEY: &str = "sk-made-up-for-the-demo";

/// The response of the stand-in, sent word by word with this pause.
const WORDS: &str =
    "Hello! These words come from the stand-in, through the proxy, one event at a time.";
const PAUSE: Duration = Duration::from_millis(80);

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if arguments.nth(1).is_some_and(|first| first == RUN_PROXY) {
        let name = "codex-responses-api-proxy".into();
        return codex_responses_proxy::main(std::iter::once(name).chain(arguments));
    }
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("The demo failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Outcome {
    let upstream = Upstream::start(respond);
    println!(
        "A stand-in Responses API listens on https://localhost:{} and requires a key.",
        upstream.port
    );
    let proxy = Proxy::start(&upstream)?;
    let port = proxy.port;
    println!("The proxy listens on http://127.0.0.1:{port} and has read the key from stdin.");

    println!("\n1. A request without a key, as an agent sends it:");
    let request = json!({ "model": "any", "input": "Say hello", "stream": true });
    let body = request.to_string();
    let mut client = Client::connect(port);
    client.send_post("Content-Type: application/json\r\n", body)?;
    print!("   {} ", client.read_head()?.status());
    while let Some(event) = client.read_part()? {
        let event = String::from_utf8(event)?;
        for data in event.lines().filter_map(|l| l.strip_prefix("data: ")) {
            print_words(&data.parse()?)?;
        }
    }

    println!("\n\n2. Other requests are rejected:");
    let mut client = Client::connect(port);
    client.send("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
    let response = client.read_response()?;
    let body = String::from_utf8(response.body)?;
    println!("   {} {body}", response.head.status());

    println!("\n3. A WebSocket, over which Codex sends one request after the other:");
    let url = format!("ws://127.0.0.1:{port}/v1/responses");
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    let (mut socket, response) = tungstenite::client(url, stream)?;
    print!("   {} ", response.status().as_u16());
    socket.send(Message::text(request.to_string()))?;
    loop {
        let event: Value = socket.read()?.to_text()?.parse()?;
        print_words(&event)?;
        if event["type"] == "response.completed" {
            break;
        }
    }

    println!(
        "\n\n4. To use the proxy with Codex, run this in another terminal:\n\n{}\n",
        codex_command(port)
    );
    if io::stdin().is_terminal() {
        println!("Press Enter or Ctrl-C to stop the demo.");
        io::stdin().read_line(&mut String::new())?;
    }
    Ok(())
}

fn codex_command(port: u16) -> String {
    format!(
        "   CODEX_HOME=$(mktemp -d) codex exec --skip-git-repo-check \\\n     \
           -c 'model_providers.proxy={{ name = \"Proxy\", base_url = \"http://127.0.0.1:{port}/v1\", wire_api = \"responses\", supports_websockets = true }}' \\\n     \
           -c model_provider=proxy 'Say hello'"
    )
}

fn print_words(event: &Value) -> io::Result<()> {
    print!("{}", event["delta"].as_str().unwrap_or_default());
    io::stdout().flush()
}

/// Responds to a request with the key, word by word.
fn respond(request: &mut UpstreamRequest<'_>) -> io::Result<()> {
    request.read_body()?;
    if request.header("authorization") != format!("Bearer {KEY}") {
        return request.respond("401 Unauthorized", "", b"");
    }
    let words: Vec<_> = WORDS.split_inclusive(' ').collect();
    if request.header("upgrade") == "websocket" {
        return respond_over_websocket(request, &words);
    }
    request.start_events()?;
    for event in events(&words) {
        thread::sleep(PAUSE);
        request.chunk(event)?;
    }
    request.chunk("")
}

/// Responds to each request over a WebSocket, until the client disconnects.
fn respond_over_websocket(request: &mut UpstreamRequest<'_>, words: &[&str]) -> io::Result<()> {
    let mut socket = request.websocket()?;
    while let Some((_, events)) = next_request(&mut socket, words) {
        for event in events {
            thread::sleep(PAUSE);
            socket.send(event).map_err(io::Error::other)?;
        }
    }
    Ok(())
}

/// The proxy as a child process, killed on drop.
struct Proxy {
    process: Child,
    port: u16,
}

impl Proxy {
    fn start(upstream: &Upstream) -> Outcome<Self> {
        let dir = TestDir::new();
        let info = dir.join("server-info.json");
        let mut process = Command::new(std::env::current_exe()?)
            .args([RUN_PROXY, "--websocket"])
            .args(["--upstream-url", &upstream.url()])
            .arg("--upstream-ca")
            .arg(upstream.ca_file().ok_or("no certificate")?)
            .arg("--server-info")
            .arg(&info)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = process.stdin.take();
        let stderr = process.stderr.take();
        let mut proxy = Self { process, port: 0 };
        writeln!(stdin.ok_or("no pipe to the proxy")?, "{KEY}")?;
        // The first line says that it listens, or why it failed.
        let mut lines = BufReader::new(stderr.ok_or("no pipe from the proxy")?);
        let mut first = String::new();
        lines.read_line(&mut first)?;
        let info: Value = std::fs::read_to_string(&info).map_err(|_| first)?.parse()?;
        let port = info["port"].as_u64().and_then(|port| port.try_into().ok());
        proxy.port = port.ok_or("no port in the info file")?;
        // Discards the rest of the log, so that the pipe does not fill up.
        thread::spawn(move || io::copy(&mut lines, &mut io::sink()));
        Ok(proxy)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
