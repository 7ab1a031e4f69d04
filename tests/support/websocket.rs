//! WebSocket handshakes as bytes. The proxy does not parse frames, so tests send arbitrary bytes after the handshake.

use super::{Client, Proxy, ProxyCommand, Script, Upstream, UpstreamRequest};
use std::io::{self, Read, Write};

/// The header fields of a handshake (RFC 6455, section 1.3).
pub(crate) const HANDSHAKE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
     Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// Header fields of the handshake of codex-cli 0.169.0, without those that identify a user.
pub(crate) const CODEX_HEADERS: &str = "user-agent: codex_exec/0.169.0 (Debian 12.0.0; x86_64) unknown (codex_exec; 0.169.0)\r\n\
    originator: codex_exec\r\nopenai-beta: responses_websockets=2026-02-06\r\n\
    x-codex-beta-features: remote_compaction_v2\r\n\
    sec-websocket-extensions: permessage-deflate; client_max_window_bits\r\n";

/// Starts the proxy with `--websocket` in front of this stand-in.
pub(crate) fn start_with_websocket(upstream: &Upstream) -> Proxy {
    ProxyCommand::for_upstream(upstream)
        .arg("--websocket")
        .start()
}

/// Starts two stand-ins with this script: over TLS and over plain HTTP.
pub(crate) fn start_tls_and_plain(script: impl Script + Clone) -> [(&'static str, Upstream); 2] {
    let tls = Upstream::start(script.clone());
    [("TLS", tls), ("plain", Upstream::start_plain(script))]
}

/// A handshake with these additional header lines, each ended by CRLF.
pub(crate) fn handshake(headers: &str) -> String {
    format!("GET /v1/responses HTTP/1.1\r\nHost: localhost\r\n{HANDSHAKE}{headers}\r\n")
}

/// A new connection through the proxy whose handshake the upstream has accepted.
pub(crate) fn open_tunnel(proxy: &Proxy, headers: &str) -> Client {
    let mut client = proxy.client();
    client.send(handshake(headers)).unwrap();
    assert_eq!(client.read_head().unwrap().status(), 101, "{headers}");
    client
}

/// Accepts a handshake and echoes all bytes until the client closes its sending half.
pub(crate) fn echo_tunnel(request: &mut UpstreamRequest<'_>) -> io::Result<()> {
    request.switch_protocols("", b"")?;
    let mut buffer = [0; 1 << 16];
    while let count @ 1.. = request.read(&mut buffer)? {
        request.write_all(&buffer[..count])?;
        request.flush()?;
    }
    request.close()
}
