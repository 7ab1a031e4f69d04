//! Shows the proxy at work with no account and no internet.
//!
//! A stand-in Responses API listens on loopback with TLS, the proxy runs in front of it with a made-up
//! key on its stdin, and a request without any key goes through, as an agent would send it.
//!
//! Run it with `cargo run --example demo`.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

/// Given as the first argument, the demo is the proxy: so it needs no other program beside it.
const BE_THE_PROXY: &str = "be-the-proxy";

/// A key that no account has.
const KEY: &str = "sk-made-up-for-the-demo";

/// What the stand-in says, a word at a time, and how long it thinks between words.
const WORDS: &str =
    "Hello! These words come from the stand-in, through the proxy, one event at a time.";
const PAUSE: Duration = Duration::from_millis(80);

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    if arguments.nth(1).is_some_and(|first| first == BE_THE_PROXY) {
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
    let folder = Folder::new()?;
    let ca_file = folder.0.join("ca.pem");
    let upstream_port = stand_in(&ca_file)?;
    println!(
        "A stand-in Responses API listens on https://localhost:{upstream_port}; it wants a key."
    );

    let proxy = Proxy::start(&folder.0, upstream_port, &ca_file)?;
    println!(
        "The proxy listens on http://127.0.0.1:{}; it has the key from its stdin.",
        proxy.port
    );

    println!("\n1. A request without a key, as an agent sends it:");
    let body = json!({ "model": "any", "input": "Say hello", "stream": true }).to_string();
    let mut answer = send(proxy.port, "POST /v1/responses", &body)?;
    print!("   {} ", status(&mut answer)?);
    for line in answer.lines() {
        // The lines between are chunk sizes and event names.
        let line = line?;
        let Some(event) = line
            .strip_prefix("data: ")
            .and_then(|data| data.parse::<Value>().ok())
        else {
            continue;
        };
        if let Some(delta) = event["delta"].as_str() {
            print!("{delta}");
            io::stdout().flush()?;
        }
    }

    println!("\n\n2. Anything else is refused:");
    let mut answer = send(proxy.port, "GET /v1/models", "")?;
    print!("   {} ", status(&mut answer)?);
    let mut rest = String::new();
    answer.read_to_string(&mut rest)?;
    println!("{}", rest.rsplit("\r\n\r\n").next().unwrap_or_default());

    println!(
        "\n3. To see Codex itself use it, run this in another terminal:\n\n{}\n",
        codex_command(proxy.port)
    );
    if io::stdin().is_terminal() {
        println!("Press Enter or Ctrl-C to end the demo.");
        io::stdin().read_line(&mut String::new())?;
    }
    Ok(())
}

fn codex_command(port: u16) -> String {
    format!(
        "   CODEX_HOME=$(mktemp -d) codex exec --skip-git-repo-check \\\n     \
           -c 'model_providers.proxy={{ name = \"Proxy\", base_url = \"http://127.0.0.1:{port}/v1\", wire_api = \"responses\" }}' \\\n     \
           -c model_provider=proxy 'Say hello'"
    )
}

/// Sends a request with no key in it, and asks for the connection to be closed after the answer.
fn send(port: u16, method_and_path: &str, body: &str) -> io::Result<BufReader<TcpStream>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let length = body.len();
    write!(
        stream,
        "{method_and_path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )?;
    Ok(BufReader::new(stream))
}

/// The status line of an answer, without the protocol's name.
fn status(answer: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    answer.read_line(&mut line)?;
    Ok(line.trim_end().trim_start_matches("HTTP/1.1 ").to_owned())
}

/// A folder for the demo's files, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> io::Result<Self> {
        let path =
            std::env::temp_dir().join(format!("codex-responses-proxy-demo-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The proxy as a process of its own, ended on drop.
struct Proxy {
    process: Child,
    port: u16,
}

impl Proxy {
    fn start(folder: &Path, upstream_port: u16, ca_file: &Path) -> Outcome<Self> {
        let info = folder.join("server-info.json");
        let mut process = Command::new(std::env::current_exe()?)
            .arg(BE_THE_PROXY)
            .arg("--upstream-url")
            .arg(format!("https://localhost:{upstream_port}/v1/responses"))
            .arg("--upstream-ca")
            .arg(ca_file)
            .arg("--server-info")
            .arg(&info)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = process.stdin.take();
        let stderr = process.stderr.take();
        let mut proxy = Self { process, port: 0 };
        writeln!(stdin.ok_or("no pipe to the proxy")?, "{KEY}")?;
        // Its first line says that it listens, or why it doesn't.
        let mut lines = BufReader::new(stderr.ok_or("no pipe from the proxy")?);
        let mut first = String::new();
        lines.read_line(&mut first)?;
        let info: Value = std::fs::read_to_string(&info).map_err(|_| first)?.parse()?;
        proxy.port = info["port"]
            .as_u64()
            .and_then(|port| port.try_into().ok())
            .ok_or("no port in the info file")?;
        // Its log is of no interest here, but somebody has to take it.
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

/// Starts the stand-in on a free port, and writes its certificate to `ca_file`.
fn stand_in(ca_file: &Path) -> Outcome<u16> {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    std::fs::write(ca_file, certified.cert.pem())?;
    let private_key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], private_key.into())?;
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let config = Arc::clone(&config);
            thread::spawn(move || {
                let tls = ServerConnection::new(config).map_err(io::Error::other)?;
                serve(BufReader::new(StreamOwned::new(tls, stream)))
            });
        }
    });
    Ok(port)
}

/// Answers requests on one connection until it ends.
fn serve(mut stream: BufReader<StreamOwned<ServerConnection, TcpStream>>) -> io::Result<()> {
    loop {
        let (mut length, mut authorized) = (0, false);
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line)? == 0 {
                return Ok(());
            }
            let line = line.trim_end();
            if line.is_empty() {
                break;
            }
            let Some((name, value)) = line.split_once(": ") else {
                continue;
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.parse().map_err(io::Error::other)?,
                "authorization" => authorized = value == format!("Bearer {KEY}"),
                _ => {}
            }
        }
        io::copy(&mut stream.by_ref().take(length), &mut io::sink())?;
        let out = stream.get_mut();
        if authorized {
            speak(out)?;
        } else {
            write!(
                out,
                "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n"
            )?;
        }
    }
}

/// The events of one answer, as Codex wants to see them.
fn speak(out: &mut impl Write) -> io::Result<()> {
    write!(
        out,
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )?;
    let mut send = |event: Value| {
        let kind = event["type"].as_str().unwrap_or_default().to_owned();
        let text = format!("event: {kind}\ndata: {event}\n\n");
        write!(out, "{:x}\r\n{text}\r\n", text.len()).and_then(|()| out.flush())
    };
    let part = json!([{ "type": "output_text", "text": WORDS, "annotations": [] }]);
    let item = |content: &Value, status: &str| json!({ "type": "message", "id": "msg_1", "role": "assistant", "status": status, "content": content });
    send(json!({ "type": "response.created", "response": { "id": "resp_1" } }))?;
    send(
        json!({ "type": "response.output_item.added", "output_index": 0, "item": item(&json!([]), "in_progress") }),
    )?;
    for word in WORDS.split_inclusive(' ') {
        thread::sleep(PAUSE);
        send(
            json!({ "type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": word }),
        )?;
    }
    send(
        json!({ "type": "response.output_item.done", "output_index": 0, "item": item(&part, "completed") }),
    )?;
    let usage = json!({ "input_tokens": 1, "output_tokens": 1, "total_tokens": 2 });
    send(json!({ "type": "response.completed", "response": { "id": "resp_1", "usage": usage } }))?;
    write!(out, "0\r\n\r\n")?;
    out.flush()
}
