//! One connection to the upstream: name, socket, tunnel, TLS.

use std::fmt;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Intercept;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower_service::Service;

use crate::target::Target;

/// How long connecting may take: looking the name up, TCP, the proxy and TLS together.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an upstream connection may be silent before the kernel asks whether the peer is there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);

/// How long between such questions, and how many go unanswered before the connection is dead.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// Why there is no connection. `Display` is the plain phrase for a client.
#[derive(Debug)]
pub enum ConnectError {
    /// The upstream's (or the proxy's) name has no address.
    Resolve(String),
    /// No TCP connection.
    Connect(String),
    /// The proxy made no tunnel.
    Proxy(String),
    /// No TLS session, a certificate that can't be trusted among the reasons.
    Tls(String),
    /// It took longer than [`CONNECT_TIMEOUT`].
    Timeout,
}

impl ConnectError {
    /// What went wrong in detail, for the log.
    #[must_use]
    pub fn detail(&self) -> &str {
        match self {
            Self::Resolve(detail)
            | Self::Connect(detail)
            | Self::Proxy(detail)
            | Self::Tls(detail) => detail,
            Self::Timeout => "timed out",
        }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Resolve(_) => f.write_str("the upstream's name could not be resolved (DNS)"),
            Self::Connect(_) => f.write_str("the upstream could not be reached (connect)"),
            Self::Proxy(_) => {
                f.write_str("the proxy on the way to the upstream made no tunnel (proxy)")
            }
            Self::Tls(_) => f.write_str("no secure connection to the upstream could be made (TLS)"),
            Self::Timeout => {
                write!(
                    f,
                    "connecting to the upstream took longer than {} s (connect)",
                    CONNECT_TIMEOUT.as_secs()
                )
            }
        }
    }
}

/// Makes connections to one target.
pub struct Connector {
    origin: Uri,
    transport: Transport,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

enum Transport {
    Direct(HttpConnector),
    Tunnel(Tunnel<HttpConnector>),
}

impl Connector {
    /// Prepares connections to `target`, through `proxy` if there is one.
    ///
    /// # Errors
    ///
    /// A sentence on what is wrong with the CA file or the upstream's name.
    pub fn new(
        target: &Target,
        proxy: Option<Intercept>,
        ca_file: Option<&Path>,
    ) -> Result<Self, String> {
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_keepalive(Some(KEEPALIVE_AFTER));
        http.set_keepalive_interval(Some(KEEPALIVE_EVERY));
        http.set_keepalive_retries(Some(KEEPALIVE_PROBES));
        let transport = match proxy {
            None => Transport::Direct(http),
            Some(proxy) => {
                let tunnel = Tunnel::new(proxy.uri().clone(), http);
                Transport::Tunnel(match proxy.basic_auth() {
                    Some(auth) => tunnel.with_auth(auth.clone()),
                    None => tunnel,
                })
            }
        };
        let config = client_config(ca_file)?;
        let tls = match &target.tls_name {
            None => None,
            Some(name) => {
                let name = ServerName::try_from(name.clone()).map_err(|_| {
                    "--upstream-url has a host that no certificate can be issued for".to_owned()
                })?;
                Some((TlsConnector::from(Arc::new(config)), name))
            }
        };
        Ok(Self {
            origin: target.origin.clone(),
            transport,
            tls,
        })
    }

    /// Makes the TLS library's random generator ready.
    ///
    /// It gathers entropy when it is first used, which takes some 40 ms of CPU: better now than in
    /// the first request, and better after the socket listens than before.
    pub fn warm_up(&self) {
        if let Some((connector, _)) = &self.tls {
            let _ = connector
                .config()
                .crypto_provider()
                .secure_random
                .fill(&mut [0]);
        }
    }

    /// Connects within [`CONNECT_TIMEOUT`].
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub async fn connect(&self) -> Result<UpstreamStream, ConnectError> {
        tokio::time::timeout(CONNECT_TIMEOUT, self.connect_unbounded())
            .await
            .map_err(|_| ConnectError::Timeout)?
    }

    async fn connect_unbounded(&self) -> Result<UpstreamStream, ConnectError> {
        let tcp = match &self.transport {
            Transport::Direct(http) => http
                .clone()
                .call(self.origin.clone())
                .await
                .map_err(|e| classify(&e))?,
            Transport::Tunnel(tunnel) => tunnel
                .clone()
                .call(self.origin.clone())
                .await
                .map_err(|error| ConnectError::Proxy(with_sources(&error)))?,
        }
        .into_inner();
        match &self.tls {
            None => Ok(UpstreamStream::Plain(tcp)),
            Some((connector, name)) => match connector.connect(name.clone(), tcp).await {
                Ok(tls) => Ok(UpstreamStream::Tls(Box::new(tls))),
                Err(error) => Err(ConnectError::Tls(with_sources(&error))),
            },
        }
    }
}

/// Tells names from sockets. hyper-util's error has no other sign than its text, which a test pins.
fn classify(error: &(dyn std::error::Error + 'static)) -> ConnectError {
    let detail = with_sources(error);
    if error.to_string().starts_with("dns error") {
        ConnectError::Resolve(detail)
    } else {
        ConnectError::Connect(detail)
    }
}

/// An error and what caused it, down to the system's own words.
pub(crate) fn with_sources(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// TLS 1.2 and 1.3 with Mozilla's roots and those in `ca_file`; HTTP/1.1 is all that is spoken.
fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore {
        roots: webpki_roots::TLS_SERVER_ROOTS.to_vec(),
    };
    if let Some(path) = ca_file {
        let unusable = |what: &str| {
            format!(
                "--upstream-ca {}: {what}; give a file with one or more PEM certificates",
                path.display()
            )
        };
        let certificates =
            CertificateDer::pem_file_iter(path).map_err(|error| unusable(&error.to_string()))?;
        let mut count = 0;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| unusable(&error.to_string()))?;
            roots
                .add(certificate)
                .map_err(|error| unusable(&error.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(unusable("no certificate found"));
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("cannot set up TLS: {error}"))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// A connection to the upstream, with TLS unless it is on loopback.
pub enum UpstreamStream {
    /// To a loopback upstream with an `http://` URL.
    Plain(TcpStream),
    /// To any other.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Does the same to whichever stream there is.
macro_rules! either {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            UpstreamStream::Plain(stream) => {
                let $stream = Pin::new(stream);
                $call
            }
            UpstreamStream::Tls(stream) => {
                let $stream = Pin::new(&mut **stream);
                $call
            }
        }
    };
}

impl AsyncRead for UpstreamStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, stream => stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, stream => stream.poll_shutdown(cx))
    }
}
