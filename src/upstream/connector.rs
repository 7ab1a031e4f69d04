//! One connection to the upstream: name, socket, tunnel, TLS.

use std::error::Error;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper::{StatusCode, Uri};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Intercept;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsConnector;
use tower_service::Service;

use super::failure::Failure;
use super::target::Target;

/// How long connecting may take: looking the name up, TCP, the proxy and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an upstream connection may be silent before the kernel asks whether the peer is there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);

/// How long between such questions, and how many go unanswered before the connection is dead.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// A connection to the upstream, with TLS unless it is on loopback.
pub(super) type Stream = Box<dyn Io>;

/// What [`Stream`] can do.
pub(super) trait Io: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

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
    pub(super) async fn connect(&self) -> Result<Stream, Failure> {
        match tokio::time::timeout(CONNECT_TIMEOUT, self.connect_unbounded()).await {
            Ok(outcome) => outcome,
            Err(elapsed) => Err(Failure {
                status: StatusCode::GATEWAY_TIMEOUT,
                ..Failure::unreachable(
                    "connecting to the upstream took longer than 10 s (connect)",
                    &elapsed,
                )
            }),
        }
    }

    async fn connect_unbounded(&self) -> Result<Stream, Failure> {
        let origin = self.origin.clone();
        let tcp = match &self.transport {
            Transport::Direct(http) => http
                .clone()
                .call(origin)
                .await
                .map_err(|error| unreachable(&error)),
            Transport::Tunnel(tunnel) => tunnel.clone().call(origin).await.map_err(|error| {
                let message = "the proxy on the way to the upstream made no tunnel (proxy)";
                Failure::unreachable(message, &error)
            }),
        }?
        .into_inner();
        let Some((tls, name)) = &self.tls else {
            // The name was one of loopback, but a name is only a name.
            let address = tcp.peer_addr().map_err(|error| unreachable(&error))?;
            if !address.ip().to_canonical().is_loopback() {
                let error = io::Error::other(format!("{address} is not this machine's loopback"));
                return Err(Failure::unreachable(NO_SOCKET, &error));
            }
            return Ok(Box::new(tcp));
        };
        match tls.connect(name.clone(), tcp).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => {
                let message = "no secure connection to the upstream could be made (TLS)";
                Err(Failure::unreachable(message, &error))
            }
        }
    }
}

/// What a client is told where there is no socket.
const NO_SOCKET: &str = "the upstream could not be reached (connect)";

/// No socket to the upstream, or no address. A name that isn't found is told by having no error number:
/// getaddrinfo(3) has codes of its own, and whatever fails behind it has one.
fn unreachable(error: &(dyn Error + 'static)) -> Failure {
    let mut causes = std::iter::successors(Some(error), |&error| error.source());
    let cause = causes.find_map(|cause| cause.downcast_ref::<io::Error>());
    let message = match cause.map(io::Error::raw_os_error) {
        Some(None) => "the upstream's name could not be resolved (DNS)",
        _ => NO_SOCKET,
    };
    Failure::unreachable(message, error)
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
