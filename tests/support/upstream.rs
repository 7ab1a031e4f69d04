//! A stand-in for the Responses API: plain threads, blocking rustls, and an exact record of each request.

use super::http::{Framing, Head, HttpStream, TIMEOUT, is_closed};
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
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tungstenite::handshake::derive_accept_key;
use tungstenite::protocol::Role;
use tungstenite::{Message, WebSocket};

/// The stand-in's handler for a request. An error closes the connection.
pub(crate) trait Script:
    Fn(&mut UpstreamRequest<'_>) -> io::Result<()> + Send + Sync + 'static
{
}
impl<T: Fn(&mut UpstreamRequest<'_>) -> io::Result<()> + Send + Sync + 'static> Script for T {}

/// Reads the whole request and responds with 200 and a small JSON body.
pub(crate) fn ok(request: &mut UpstreamRequest<'_>) -> io::Result<()> {
    request.read_body()?;
    let json = "Content-Type: application/json\r\n";
    request.respond("200 OK", json, b"{\"ok\":true}")
}

/// Responds with the request's own body.
pub(crate) fn echo(request: &mut UpstreamRequest<'_>) -> io::Result<()> {
    let body = request.read_body()?.to_vec();
    request.respond("200 OK", "", &body)
}

/// The events of a response with these words, as the Responses API sends them and Codex expects them. Over a WebSocket,
/// each event is one text message.
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

/// The same events in the format of server-sent events.
pub(crate) fn events(words: &[&str]) -> Vec<String> {
    let name = |event: &Value| event["type"].as_str().unwrap().to_owned();
    let line = |event: Value| format!("event: {}\ndata: {event}\n\n", name(&event));
    messages(words).into_iter().map(line).collect()
}

/// The next request over a WebSocket, and the events of a response with these words. `None` once the client has
/// disconnected: Codex sends no close frame.
pub(crate) fn next_request(
    socket: &mut WebSocket<&mut UpstreamRequest<'_>>,
    words: &[&str],
) -> Option<(Value, Vec<Message>)> {
    while let Ok(message) = socket.read() {
        let Message::Text(text) = message else {
            continue;
        };
        let request: Value = text.parse().expect("JSON");
        // Codex opens a connection early with a request that generates no words.
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

/// The receiving end of a channel between a script and its test. Scripts are `Sync`, unlike [`Receiver`].
pub(crate) struct SharedReceiver<T>(Mutex<Receiver<T>>);

pub(crate) fn channel<T>() -> (Sender<T>, SharedReceiver<T>) {
    let (sender, receiver) = mpsc::channel();
    (sender, SharedReceiver(Mutex::new(receiver)))
}

impl<T> SharedReceiver<T> {
    /// Waits at most [`TIMEOUT`].
    pub(crate) fn recv(&self) -> io::Result<T> {
        self.recv_timeout(TIMEOUT)
    }

    pub(crate) fn recv_timeout(&self, time: Duration) -> io::Result<T> {
        let received = self.0.lock().unwrap().recv_timeout(time);
        received.map_err(io::Error::other)
    }
}

/// A temporary directory, removed on drop. Every user may enter it.
pub(crate) struct TestDir(tempfile::TempDir);

impl TestDir {
    pub(crate) fn new() -> Self {
        let permissions = Permissions::from_mode(0o755);
        let dir = tempfile::Builder::new().permissions(permissions).tempdir();
        Self(dir.unwrap())
    }
}

impl Deref for TestDir {
    type Target = Path;

    fn deref(&self) -> &Path {
        self.0.path()
    }
}

/// What the stand-in received of one request.
#[derive(Clone, Debug)]
pub(crate) struct RecordedRequest {
    /// The number of its connection, counted from 0.
    pub(crate) connection: usize,
    pub(crate) head: Head,
    pub(crate) framing: Framing,
    /// The part of the body that was read.
    pub(crate) body: Vec<u8>,
    /// Whether the body was read to its end and was not truncated.
    pub(crate) complete: bool,
}

/// The stand-in. It serves until the end of the test or [`Self::into_requests`].
pub(crate) struct Upstream {
    pub(crate) port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<Vec<JoinHandle<()>>>>,
    dir: TestDir,
}

struct Shared {
    script: Box<dyn Script<Output = io::Result<()>>>,
    tls: Option<Arc<ServerConfig>>,
    requests: Mutex<Vec<RecordedRequest>>,
    connections: AtomicUsize,
    is_closing: AtomicBool,
}

impl Upstream {
    /// Serves over TLS with a new certificate for `localhost` and `127.0.0.1`.
    pub(crate) fn start(script: impl Script) -> Self {
        Self::with_certificate(&["localhost", "127.0.0.1"], |_| {}, script)
    }

    /// Serves over TLS with a certificate for these names. `change` may set other parameters of it.
    pub(crate) fn with_certificate(
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
        script: impl Script,
    ) -> Self {
        let provider = aws_lc_rs::default_provider();
        Self::with_tls(provider, ALL_VERSIONS, names, change, script)
    }

    /// The same with these TLS versions and this provider.
    pub(crate) fn with_tls(
        provider: CryptoProvider,
        versions: &[&'static SupportedProtocolVersion],
        names: &[&str],
        change: impl FnOnce(&mut CertificateParams),
        script: impl Script,
    ) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // With equal names, OpenSSL would take the server's certificate for a self-signed one.
        params.distinguished_name.push(DnType::CommonName, "CA");
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = TestDir::new();
        fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names: Vec<_> = names.iter().copied().map(str::to_owned).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &authority).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(provider));
        let config = config.with_protocol_versions(versions).unwrap();
        let config = config.with_no_client_auth();
        let config = config.with_single_cert(vec![certificate.der().clone()], key.into());
        Self::start_with(Some(Arc::new(config.unwrap())), dir, script)
    }

    pub(crate) fn start_plain(script: impl Script) -> Self {
        Self::start_with(None, TestDir::new(), script)
    }

    fn start_with(tls: Option<Arc<ServerConfig>>, dir: TestDir, script: impl Script) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            script: Box::new(script),
            tls,
            requests: Mutex::default(),
            connections: AtomicUsize::new(0),
            is_closing: AtomicBool::new(false),
        });
        let for_acceptor = shared.clone();
        let acceptor = thread::spawn(move || {
            let mut threads = Vec::new();
            for stream in listener.incoming() {
                if for_acceptor.is_closing.load(Ordering::SeqCst) {
                    break;
                }
                let number = for_acceptor.connections.fetch_add(1, Ordering::SeqCst);
                let shared = for_acceptor.clone();
                threads.push(thread::spawn(move || {
                    // The test decides what a disconnect means.
                    let _ = shared.serve(number, stream.unwrap());
                }));
            }
            threads
        });
        Self {
            port,
            shared,
            acceptor: Some(acceptor),
            dir,
        }
    }

    pub(crate) fn url(&self) -> String {
        let scheme = self.shared.tls.as_ref().map_or("http", |_| "https");
        format!("{scheme}://localhost:{}/v1/responses", self.port)
    }

    /// The file with the CA that signed the stand-in's certificate. `None` for plain HTTP.
    pub(crate) fn ca_file(&self) -> Option<PathBuf> {
        self.shared.tls.as_ref().map(|_| self.dir.join("ca.pem"))
    }

    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// The requests so far whose body was read or whose script has returned.
    pub(crate) fn requests(&self) -> Vec<RecordedRequest> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// The only request so far.
    pub(crate) fn single_request(&self) -> RecordedRequest {
        let [request] = self.requests().try_into().expect("one request");
        request
    }

    /// Waits until every connection is closed, and returns all requests. Stop the proxy first: this includes everything
    /// that it sent.
    pub(crate) fn into_requests(mut self) -> Vec<RecordedRequest> {
        self.shared.is_closing.store(true, Ordering::SeqCst);
        // The kernel queues connections in order, so the acceptor gets this one last.
        TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        for connection in self.acceptor.take().unwrap().join().unwrap() {
            connection.join().expect("the script must not panic");
        }
        self.requests()
    }
}

impl Shared {
    fn serve(&self, connection: usize, socket: TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        let transport: Box<dyn Transport> = match &self.tls {
            None => Box::new(socket.try_clone()?),
            Some(config) => {
                let session = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
                Box::new(StreamOwned::new(session, socket.try_clone()?))
            }
        };
        let mut http = HttpStream::new(transport);
        while let Some(head) = http.read_head()? {
            http.body = head.framing(Framing::Length(0));
            let mut request = UpstreamRequest {
                recorded: RecordedRequest {
                    connection,
                    framing: http.body,
                    head,
                    body: Vec::new(),
                    complete: false,
                },
                is_published: false,
                http: &mut http,
                socket: &socket,
                shared: self,
            };
            let result = (self.script)(&mut request);
            request.publish();
            result?;
        }
        http.reader.get_mut().close_notify()
    }
}

/// A request in the hands of a [`Script`], which reads it and responds.
pub(crate) struct UpstreamRequest<'a> {
    pub(crate) recorded: RecordedRequest,
    is_published: bool,
    http: &'a mut HttpStream<Box<dyn Transport>>,
    socket: &'a TcpStream,
    shared: &'a Shared,
}

impl UpstreamRequest<'_> {
    pub(crate) fn header(&self, name: &str) -> String {
        self.recorded.head.get(name).unwrap_or_default().to_owned()
    }

    /// The next part of the request's body, `None` at its end, an error if it is truncated.
    pub(crate) fn read_part(&mut self) -> io::Result<Option<Vec<u8>>> {
        let part = self.http.read_part()?;
        match &part {
            Some(part) => self.recorded.body.extend_from_slice(part),
            None => self.recorded.complete = true,
        }
        Ok(part)
    }

    pub(crate) fn read_body(&mut self) -> io::Result<&[u8]> {
        while self.read_part()?.is_some() {}
        // The test may look at the request as soon as the response is sent.
        self.publish();
        Ok(&self.recorded.body)
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        let stream = self.http.reader.get_mut();
        stream.write_all(bytes.as_ref())?;
        stream.flush()
    }

    /// Sends a response with a `Content-Length`. Each header line ends with CRLF.
    pub(crate) fn respond(&mut self, status: &str, headers: &str, body: &[u8]) -> io::Result<()> {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n");
        self.send(head)?;
        self.send(body)
    }

    /// Sends the head of a chunked event stream.
    pub(crate) fn start_events(&mut self) -> io::Result<()> {
        self.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    }

    /// Sends a chunk; an empty one ends the response.
    pub(crate) fn chunk(&mut self, data: impl AsRef<[u8]>) -> io::Result<()> {
        self.send(super::http::chunk(data.as_ref()))
    }

    pub(crate) fn respond_with_events(&mut self, events: &[impl AsRef<[u8]>]) -> io::Result<()> {
        self.start_events()?;
        events.iter().try_for_each(|event| self.chunk(event))?;
        self.chunk("")
    }

    /// Accepts a WebSocket handshake with these headers, and sends these bytes in the same write.
    pub(crate) fn switch_protocols(&mut self, headers: &str, rest: &[u8]) -> io::Result<()> {
        // The body is empty. Reading it publishes the request before the client gets the response.
        self.read_body()?;
        let accept = derive_accept_key(self.header("sec-websocket-key").as_bytes());
        let head = format!(
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Accept: {accept}\r\n{headers}\r\n"
        );
        self.send([head.as_bytes(), rest].concat())
    }

    /// Accepts a WebSocket handshake.
    pub(crate) fn websocket(&mut self) -> io::Result<WebSocket<&mut Self>> {
        self.switch_protocols("", b"")?;
        Ok(WebSocket::from_raw_socket(self, Role::Server, None))
    }

    /// Reads exactly this many bytes after the handshake on an upgraded connection.
    pub(crate) fn read_bytes(&mut self, count: usize) -> io::Result<Vec<u8>> {
        self.http.read_bytes(count)
    }

    /// Reads until the proxy closes this connection or its sending half.
    pub(crate) fn read_until_closed(&mut self) -> io::Result<Vec<u8>> {
        self.http.read_until_closed()
    }

    /// Closes the sending half of the connection, with close_notify over TLS.
    pub(crate) fn shutdown_write(&mut self) -> io::Result<()> {
        self.http.reader.get_mut().close_notify()?;
        self.socket.shutdown(Shutdown::Write)
    }

    /// Closes the connection, with close_notify over TLS.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        self.http.reader.get_mut().close_notify()?;
        self.close_abruptly()
    }

    /// Closes the connection without close_notify.
    pub(crate) fn close_abruptly(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Both)?;
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Closes the connection with a TCP reset.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        reset_on_close(self.socket);
        Err(io::ErrorKind::ConnectionReset.into())
    }

    /// Waits until the proxy has closed this connection. Fails if the proxy sends more bytes, or on a timeout.
    pub(crate) fn wait_until_closed(&mut self) -> io::Result<()> {
        match self.http.reader.fill_buf() {
            Ok([_, ..]) => Err(io::Error::other("the proxy sent more")),
            Err(error) if !is_closed(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Adds the request to [`Upstream::requests`], once.
    fn publish(&mut self) {
        if !std::mem::replace(&mut self.is_published, true) {
            self.shared
                .requests
                .lock()
                .unwrap()
                .push(self.recorded.clone());
        }
    }
}

impl Read for UpstreamRequest<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.http.reader.read(buffer)
    }
}

impl Write for UpstreamRequest<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.http.reader.get_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.http.reader.get_mut().flush()
    }
}

trait Transport: Read + Write {
    /// Sends close_notify over TLS.
    fn close_notify(&mut self) -> io::Result<()>;
}

impl Transport for TcpStream {
    fn close_notify(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for StreamOwned<ServerConnection, TcpStream> {
    fn close_notify(&mut self) -> io::Result<()> {
        self.conn.send_close_notify();
        self.flush()
    }
}

/// Makes the kernel send RST instead of FIN when the socket is closed.
pub(crate) fn reset_on_close(socket: &TcpStream) {
    let (l_onoff, l_linger) = (1, 0);
    setsockopt(socket, Linger, &linger { l_onoff, l_linger }).unwrap();
}
