//! A stand-in for the Responses API: plain threads, blocking rustls, and a record of what came exactly as it came.

use super::http::{Framing, Head, PATIENCE, Wire, is_closed};
use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt::Linger};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::{ALL_VERSIONS, ServerConfig, ServerConnection, StreamOwned, SupportedProtocolVersion};
use serde_json::{Value, json};
use std::fs::{self, Permissions};
use std::io::{self, BufRead, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

/// What the stand-in does with a request. An error ends the connection.
pub(crate) trait Script:
    Fn(&mut Exchange<'_>) -> io::Result<()> + Send + Sync + 'static
{
}
impl<T: Fn(&mut Exchange<'_>) -> io::Result<()> + Send + Sync + 'static> Script for T {}

/// Answers every request, once it has come whole, with 200 and a small JSON body.
pub(crate) fn ok(exchange: &mut Exchange<'_>) -> io::Result<()> {
    exchange.body()?;
    let json = "Content-Type: application/json\r\n";
    exchange.answer("200 OK", json, b"{\"ok\":true}")
}

/// Answers every request with its own body.
pub(crate) fn echo(exchange: &mut Exchange<'_>) -> io::Result<()> {
    let body = exchange.body()?.to_vec();
    exchange.answer("200 OK", "", &body)
}

/// The events of a response with these words, as the Responses API sends them and Codex wants to see them: over a
/// WebSocket one to a text message.
fn messages(words: &[&str]) -> Vec<Value> {
    let message = |content| json!({ "type": "message", "id": "msg_1", "role": "assistant", "content": content });
    let text = json!([{ "type": "output_text", "text": words.concat(), "annotations": [] }]);
    let usage = json!({ "input_tokens": 1, "output_tokens": 1, "total_tokens": 2 });
    let mut events = vec![
        json!({ "type": "response.created", "response": { "id": "resp_1" } }),
        json!({ "type": "response.output_item.added", "output_index": 0, "item": message(json!([])) }),
    ];
    events.extend(words.iter().map(|word| json!({
        "type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": word,
    })));
    events.extend([
        json!({ "type": "response.output_item.done", "output_index": 0, "item": message(text) }),
        json!({ "type": "response.completed", "response": { "id": "resp_1", "usage": usage } }),
    ]);
    events
}

/// The same as server-sent events.
pub(crate) fn events(words: &[&str]) -> Vec<String> {
    let name = |event: &Value| event["type"].as_str().unwrap().to_owned();
    let line = |event: Value| format!("event: {}\ndata: {event}\n\n", name(&event));
    messages(words).into_iter().map(line).collect()
}

/// The next request over a WebSocket, and the events of the response with these words; nothing when the client has left,
/// which Codex does without a close frame.
pub(crate) fn next_request(
    socket: &mut WebSocket<&mut Exchange<'_>>,
    words: &[&str],
) -> Option<(Value, Vec<Message>)> {
    while let Ok(message) = socket.read() {
        let Message::Text(text) = message else {
            continue;
        };
        let request: Value = text.parse().expect("JSON");
        // Codex warms a connection up with a request that generates nothing.
        let words = if request["generate"] == false {
            &[]
        } else {
            words
        };
        let events = messages(words).into_iter();
        let events = events.map(|event| Message::text(event.to_string()));
        return Some((request, events.collect()));
    }
    None
}

/// Something that a script and a test tell each other, and wait for.
pub(crate) struct Told<T>(Mutex<Receiver<T>>);

pub(crate) fn telling<T>() -> (Sender<T>, Told<T>) {
    let (tell, told) = channel();
    (tell, Told(Mutex::new(told)))
}

impl<T> Told<T> {
    pub(crate) fn wait(&self) -> io::Result<T> {
        self.within(PATIENCE)
    }

    /// Waits until it is told, but not longer than this.
    pub(crate) fn within(&self, time: Duration) -> io::Result<T> {
        let told = self.0.lock().unwrap().recv_timeout(time);
        told.map_err(io::Error::other)
    }
}

/// A folder of the test's own that is removed with it. Everyone may enter it.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        let open = Permissions::from_mode(0o755);
        let folder = tempfile::Builder::new().permissions(open).tempdir();
        Self(folder.unwrap())
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.0.path()
    }
}

/// A request that reached the stand-in.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    /// Which of the connections it came over, counted from 0.
    pub(crate) connection: usize,
    pub(crate) head: Head,
    pub(crate) framing: Framing,
    /// What was read of the body.
    pub(crate) body: Vec<u8>,
    /// Whether the body was read to its proper end.
    pub(crate) complete: bool,
}

/// The stand-in. It serves until it is closed or the test ends.
pub(crate) struct Upstream {
    pub(crate) port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<Vec<JoinHandle<()>>>>,
    folder: Folder,
}

struct Shared {
    script: Box<dyn Script<Output = io::Result<()>>>,
    tls: Option<Arc<ServerConfig>>,
    seen: Mutex<Vec<Seen>>,
    connections: AtomicUsize,
    closing: AtomicBool,
}

impl Upstream {
    /// Serves over TLS as `localhost` and `127.0.0.1`, with a certificate made for this test.
    pub(crate) fn start(script: impl Script) -> Self {
        Self::with_certificate(&["localhost", "127.0.0.1"], |_| {}, script)
    }

    /// Serves over TLS with a certificate for these names only, and whatever else is made of it.
    pub(crate) fn with_certificate(
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
        script: impl Script,
    ) -> Self {
        let provider = aws_lc_rs::default_provider();
        Self::with_tls(provider, ALL_VERSIONS, names, change, script)
    }

    /// The same over TLS of these versions, by this provider.
    pub(crate) fn with_tls(
        provider: CryptoProvider,
        versions: &[&'static SupportedProtocolVersion],
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
        script: impl Script,
    ) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // With the server's own name, OpenSSL would take the server's certificate for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, "CA");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = Folder::new();
        fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().copied().map(str::to_owned).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &authority).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(provider));
        let config = config.with_protocol_versions(versions).unwrap();
        let config = config.with_no_client_auth();
        let config = config.with_single_cert(vec![certificate.der().clone()], key.into());
        Self::launch(Some(Arc::new(config.unwrap())), folder, script)
    }

    pub(crate) fn plain(script: impl Script) -> Self {
        Self::launch(None, Folder::new(), script)
    }

    fn launch(tls: Option<Arc<ServerConfig>>, folder: Folder, script: impl Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            script: Box::new(script),
            tls,
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
        });
        let of_acceptor = shared.clone();
        let acceptor = thread::spawn(move || {
            let mut threads = Vec::new();
            for stream in listener.incoming() {
                if of_acceptor.closing.load(Ordering::SeqCst) {
                    break;
                }
                let number = of_acceptor.connections.fetch_add(1, Ordering::SeqCst);
                let shared = of_acceptor.clone();
                threads.push(thread::spawn(move || {
                    // A peer that is gone ends a connection; what that means is for the test to say.
                    let _ = shared.serve(number, stream.unwrap());
                }));
            }
            threads
        });
        Self {
            port,
            shared,
            acceptor: Some(acceptor),
            folder,
        }
    }

    pub(crate) fn url(&self) -> String {
        let scheme = self.shared.tls.as_ref().map_or("http", |_| "https");
        format!("{scheme}://localhost:{}/v1/responses", self.port)
    }

    /// The file with the authority that signed the stand-in's certificate, if it has one.
    pub(crate) fn authority(&self) -> Option<PathBuf> {
        self.shared.tls.as_ref().map(|_| self.folder.join("ca.pem"))
    }

    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// The requests so far whose script has ended or is past the body.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    pub(crate) fn only(&self) -> Seen {
        let [only] = self.seen().try_into().expect("one request");
        only
    }

    /// Waits until every connection has ended, which the proxy's end makes sure of, and tells all that came.
    /// Whatever the proxy had sent when it ended is in there: nothing is in flight any more.
    pub(crate) fn close(mut self) -> Vec<Seen> {
        self.shared.closing.store(true, Ordering::SeqCst);
        // The acceptor takes connections in order: it sees this one after all others.
        TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        for connection in self.acceptor.take().unwrap().join().unwrap() {
            connection.join().expect("the script must not panic");
        }
        self.seen()
    }
}

impl Shared {
    fn serve(&self, connection: usize, socket: TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        let transport: Box<dyn Transport> = match &self.tls {
            None => Box::new(socket.try_clone()?),
            Some(config) => {
                let session = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(session, socket.try_clone()?))
            }
        };
        let mut wire = Wire::new(transport);
        while let Some(head) = wire.head()? {
            wire.body = head.framing(Framing::Length(0));
            let mut exchange = Exchange {
                seen: Seen {
                    connection,
                    framing: wire.body,
                    head,
                    body: Vec::new(),
                    complete: false,
                },
                recorded: false,
                wire: &mut wire,
                socket: &socket,
                shared: self,
            };
            let result = (self.script)(&mut exchange);
            exchange.record();
            result?;
        }
        wire.reader.get_mut().end()
    }
}

pub(crate) struct Exchange<'a> {
    pub(crate) seen: Seen,
    recorded: bool,
    wire: &'a mut Wire<Box<dyn Transport>>,
    socket: &'a TcpStream,
    shared: &'a Shared,
}

impl Exchange<'_> {
    pub(crate) fn header(&self, name: &str) -> String {
        self.seen.head.get(name).unwrap_or_default().to_owned()
    }

    /// The next piece of the request's body.
    pub(crate) fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        let piece = self.wire.piece()?;
        match &piece {
            Some(piece) => self.seen.body.extend_from_slice(piece),
            None => self.seen.complete = true,
        }
        Ok(piece)
    }

    pub(crate) fn body(&mut self) -> io::Result<&[u8]> {
        while self.piece()?.is_some() {}
        // From here on the test may look: it often learns from the answer that the request has come.
        self.record();
        Ok(&self.seen.body)
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        let stream = self.wire.reader.get_mut();
        stream.write_all(bytes.as_ref())?;
        stream.flush()
    }

    pub(crate) fn answer(&mut self, status: &str, headers: &str, body: &[u8]) -> io::Result<()> {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n");
        self.send(head)?;
        self.send(body)
    }

    /// Begins an answer of events, whose length nobody knows yet.
    pub(crate) fn begin_events(&mut self) -> io::Result<()> {
        self.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    }

    /// Sends a chunk; an empty one ends the answer.
    pub(crate) fn chunk(&mut self, data: impl AsRef<[u8]>) -> io::Result<()> {
        self.send(super::http::chunk(data.as_ref()))
    }

    pub(crate) fn answer_events(&mut self, events: &[impl AsRef<[u8]>]) -> io::Result<()> {
        self.begin_events()?;
        events.iter().try_for_each(|event| self.chunk(event))?;
        self.chunk("")
    }

    /// Accepts a WebSocket handshake with these headers, and sends these bytes in the same segment.
    pub(crate) fn switch(&mut self, headers: &str, rest: &[u8]) -> io::Result<()> {
        // The body is empty, and the request is recorded before the client learns that it arrived.
        self.body()?;
        let accept = derive_accept_key(self.header("sec-websocket-key").as_bytes());
        let head = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {accept}\r\n{headers}\r\n"
        );
        self.send([head.as_bytes(), rest].concat())
    }

    /// Accepts a WebSocket handshake.
    pub(crate) fn websocket(&mut self) -> io::Result<WebSocket<&mut Self>> {
        self.switch("", b"")?;
        Ok(WebSocket::from_raw_socket(self, Role::Server, None))
    }

    /// Exactly this many of the bytes that follow the request, on a connection that was upgraded.
    pub(crate) fn receive(&mut self, count: usize) -> io::Result<Vec<u8>> {
        self.wire.receive(count)
    }

    /// Waits for the proxy to close this connection, or its half of it; what it still sent.
    pub(crate) fn until_closed(&mut self) -> io::Result<Vec<u8>> {
        self.wire.until_closed()
    }

    /// Closes the sending half of the connection.
    pub(crate) fn finish_sending(&mut self) -> io::Result<()> {
        self.wire.reader.get_mut().end()?;
        self.socket.shutdown(Shutdown::Write)
    }

    /// Closes the connection now, properly.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        self.wire.reader.get_mut().end()?;
        self.cut()
    }

    /// Closes the connection now, without TLS's notice that it is the end.
    pub(crate) fn cut(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Both)?;
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    pub(crate) fn reset(&mut self) -> io::Result<()> {
        reset_on_close(self.socket);
        Err(io::ErrorKind::ConnectionReset.into())
    }

    /// Waits until the proxy has closed this connection; an error if it sends anything instead, or nothing at all.
    pub(crate) fn wait_until_left(&mut self) -> io::Result<()> {
        match self.wire.reader.fill_buf() {
            Ok([_, ..]) => Err(io::Error::other("the proxy sent more")),
            Err(error) if !is_closed(&error) => Err(error),
            _ => Ok(()),
        }
    }

    fn record(&mut self) {
        if !std::mem::replace(&mut self.recorded, true) {
            self.shared.seen.lock().unwrap().push(self.seen.clone());
        }
    }
}

impl Read for Exchange<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.wire.reader.read(buffer)
    }
}

impl Write for Exchange<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wire.reader.get_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.wire.reader.get_mut().flush()
    }
}

trait Transport: Read + Write {
    fn end(&mut self) -> io::Result<()>;
}

impl Transport for TcpStream {
    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for StreamOwned<ServerConnection, TcpStream> {
    fn end(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()
    }
}

pub(crate) fn reset_on_close(socket: &TcpStream) {
    let (l_onoff, l_linger) = (1, 0);
    setsockopt(socket, Linger, &linger { l_onoff, l_linger }).unwrap();
}
