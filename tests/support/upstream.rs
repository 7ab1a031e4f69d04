//! A stand-in for the Responses API: plain threads, blocking rustls, and a record of what came exactly as it came.

use super::{
    Folder, PATIENCE,
    http::{Framing, Head, Wire, is_closed},
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ServerConfig, ServerConnection, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use std::{
    fs,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
};

/// What the stand-in does with a request. An error ends the connection.
pub(crate) trait Script:
    Fn(&mut Exchange<'_>) -> io::Result<()> + Send + Sync + 'static
{
}
impl<T: Fn(&mut Exchange<'_>) -> io::Result<()> + Send + Sync + 'static> Script for T {}

/// Answers every request, once it has come whole, with 200 and a small JSON body.
pub(crate) fn ok(exchange: &mut Exchange<'_>) -> io::Result<()> {
    exchange.body()?;
    exchange.answer(
        "200 OK",
        "Content-Type: application/json\r\n",
        b"{\"ok\":true}",
    )
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
    scheme: &'static str,
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
        let folder = Folder::new();
        let identity = Identity::new(names, change);
        fs::write(folder.join("ca.pem"), &identity.authority).unwrap();
        Self::launch("https", Some(identity.config), folder, script)
    }

    /// Serves without TLS.
    pub(crate) fn plain(script: impl Script) -> Self {
        Self::launch("http", None, Folder::new(), script)
    }

    fn launch(
        scheme: &'static str,
        tls: Option<Arc<ServerConfig>>,
        folder: Folder,
        script: impl Script,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared {
            script: Box::new(script),
            tls,
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
        });
        let acceptor = thread::spawn({
            let shared = shared.clone();
            move || {
                let mut threads = Vec::new();
                for stream in listener.incoming() {
                    if shared.closing.load(Ordering::SeqCst) {
                        break;
                    }
                    let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                    let shared = shared.clone();
                    threads.push(thread::spawn(move || {
                        // A peer that is gone ends a connection; what that means is for the test to say.
                        let _ = shared.serve(number, stream.unwrap());
                    }));
                }
                threads
            }
        });
        Self {
            port,
            scheme,
            shared,
            acceptor: Some(acceptor),
            folder,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://localhost:{}/v1/responses", self.scheme, self.port)
    }

    /// The file with the authority that signed the stand-in's certificate, if it has one.
    pub(crate) fn authority(&self) -> Option<PathBuf> {
        self.shared.tls.as_ref().map(|_| self.folder.join("ca.pem"))
    }

    /// How many connections have been accepted.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// The requests so far whose script has ended or is past the body.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// The one request that came.
    pub(crate) fn only(&self) -> Seen {
        let seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.into_iter().next().unwrap()
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
        let mut wire = Wire::new(match &self.tls {
            None => Transport::Plain(socket),
            Some(config) => {
                let session = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
                Transport::Tls(Box::new(StreamOwned::new(session, socket)))
            }
        });
        while let Some(head) = wire.head()? {
            wire.body = head.framing(Framing::Length(0));
            let framing = wire.body;
            let mut exchange = Exchange {
                connection,
                head,
                framing,
                read: Vec::new(),
                complete: false,
                last: false,
                recorded: false,
                wire: &mut wire,
                shared: self,
            };
            let result = (self.script)(&mut exchange);
            exchange.record();
            let last = exchange.last;
            result?;
            if last {
                break;
            }
        }
        wire.stream.end()
    }
}

/// A request being served.
pub(crate) struct Exchange<'a> {
    /// Which of the connections it came over, counted from 0.
    pub(crate) connection: usize,
    pub(crate) head: Head,
    framing: Framing,
    read: Vec<u8>,
    complete: bool,
    last: bool,
    recorded: bool,
    wire: &'a mut Wire<Transport>,
    shared: &'a Shared,
}

impl Exchange<'_> {
    /// The next piece of the request's body.
    pub(crate) fn piece(&mut self) -> io::Result<Option<Vec<u8>>> {
        let piece = self.wire.piece()?;
        match &piece {
            Some(piece) => self.read.extend_from_slice(piece),
            None => self.complete = true,
        }
        Ok(piece)
    }

    /// The request's whole body.
    pub(crate) fn body(&mut self) -> io::Result<&[u8]> {
        while self.piece()?.is_some() {}
        // From here on the test may look: it often learns from the answer that the request has come.
        self.record();
        Ok(&self.read)
    }

    /// Writes these bytes and nothing else.
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.wire.stream.write_all(bytes.as_ref())?;
        self.wire.stream.flush()
    }

    /// Answers with a body of known length.
    pub(crate) fn answer(&mut self, status: &str, headers: &str, body: &[u8]) -> io::Result<()> {
        let length = body.len();
        self.send(format!(
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {length}\r\n\r\n"
        ))?;
        self.send(body)
    }

    /// Begins an answer of events, whose length nobody knows yet.
    pub(crate) fn begin_events(&mut self) -> io::Result<()> {
        self.send("HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    }

    /// Sends a chunk; an empty one ends the answer.
    pub(crate) fn chunk(&mut self, data: &str) -> io::Result<()> {
        self.send(format!("{:x}\r\n{data}\r\n", data.len()))
    }

    /// Closes the connection properly once the script has ended.
    pub(crate) fn close_after(&mut self) {
        self.last = true;
    }

    /// Closes the connection now, properly.
    pub(crate) fn close(&mut self) -> io::Result<()> {
        self.wire.stream.end()?;
        self.cut()
    }

    /// Closes the connection now, without TLS's notice that it is the end.
    pub(crate) fn cut(&mut self) -> io::Result<()> {
        self.wire
            .stream
            .socket()
            .shutdown(std::net::Shutdown::Both)?;
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    /// Resets the connection.
    pub(crate) fn reset(&mut self) -> io::Result<()> {
        reset_on_close(self.wire.stream.socket());
        Err(io::ErrorKind::ConnectionReset.into())
    }

    /// Waits until the proxy has closed this connection; an error if it sends anything instead, or nothing at all.
    pub(crate) fn wait_until_left(&mut self) -> io::Result<()> {
        match self.wire.stream.read(&mut [0; 1]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(io::Error::other("the proxy sent more")),
            Err(error) if is_closed(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn record(&mut self) {
        if !std::mem::replace(&mut self.recorded, true) {
            self.shared.seen.lock().unwrap().push(Seen {
                connection: self.connection,
                head: self.head.clone(),
                framing: self.framing,
                body: self.read.clone(),
                complete: self.complete,
            });
        }
    }
}

/// A connection, with or without TLS.
enum Transport {
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
    Plain(TcpStream),
}

impl Transport {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Tls(stream) => &stream.sock,
            Self::Plain(socket) => socket,
        }
    }

    /// Says that this is the end.
    fn end(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(stream) => {
                stream.conn.send_close_notify();
                stream.flush()
            }
            Self::Plain(_) => Ok(()),
        }
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tls(stream) => stream.read(buffer),
            Self::Plain(socket) => socket.read(buffer),
        }
    }
}

impl Write for Transport {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tls(stream) => stream.write(bytes),
            Self::Plain(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Tls(stream) => stream.flush(),
            Self::Plain(socket) => socket.flush(),
        }
    }
}

/// A certificate with its key, and the authority that signed it.
struct Identity {
    authority: String,
    config: Arc<ServerConfig>,
}

impl Identity {
    fn new(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &authority).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        Self {
            authority: authority.pem(),
            config: Arc::new(config),
        }
    }
}

/// Makes the close of this socket a reset.
pub(crate) fn reset_on_close(socket: &TcpStream) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: the descriptor is open for as long as `socket` is borrowed, and `linger` is what this option takes.
    #[allow(unsafe_code)]
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        )
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}
