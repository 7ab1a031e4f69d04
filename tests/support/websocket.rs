//! WebSocket handshakes as bytes. What follows them is opaque to the proxy, so tests send arbitrary bytes
//! instead of frames.

use super::{Client, Exchange, Launch, Proxy, Script, Upstream};
use std::io::{self, Read, Write};

/// The headers of a handshake (RFC 6455, section 1.3).
pub(crate) const HANDSHAKE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// Headers of the handshake of codex-cli 0.169.0, without what is about the user.
pub(crate) const CODEX_HEADERS: &str = "user-agent: codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)\r\n\
    originator: codex_exec\r\nopenai-beta: responses_websockets=2026-02-06\r\n\
    x-codex-beta-features: remote_compaction_v2\r\n\
    sec-websocket-extensions: permessage-deflate; client_max_window_bits\r\n";

/// The program in front of this stand-in, which accepts handshakes.
pub(crate) fn start_with_websocket(upstream: &Upstream) -> Proxy {
    Launch::to(upstream).arg("--websocket").start()
}

/// Stand-ins with this script, over TLS and over plain HTTP.
pub(crate) fn both(script: impl Script + Clone) -> [(&'static str, Upstream); 2] {
    let tls = Upstream::start(script.clone());
    [("TLS", tls), ("plain", Upstream::plain(script))]
}

/// A handshake with these headers too, each ended by CRLF.
pub(crate) fn handshake(headers: &str) -> String {
    format!("GET /v1/responses HTTP/1.1\r\nHost: localhost\r\n{HANDSHAKE}{headers}\r\n")
}

/// A tunnel through the proxy: a connection of its own whose handshake has been accepted.
pub(crate) fn open_tunnel(proxy: &Proxy, headers: &str) -> Client {
    let mut client = proxy.client();
    client.send(handshake(headers)).unwrap();
    assert_eq!(client.head().unwrap().status(), 101, "{headers}");
    client
}

/// Accepts a handshake and returns all bytes until the client sends no more.
pub(crate) fn echo_tunnel(exchange: &mut Exchange<'_>) -> io::Result<()> {
    exchange.switch("", b"")?;
    let mut buffer = [0; 1 << 16];
    while let count @ 1.. = exchange.read(&mut buffer)? {
        exchange.write_all(&buffer[..count])?;
        exchange.flush()?;
    }
    exchange.close()
}
