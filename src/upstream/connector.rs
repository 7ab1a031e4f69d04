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
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tower_service::Service;

use super::target::Target;
use crate::failure::Failure;
use crate::log;
use crate::peer::PeerCheck;

/// How long connecting may take: looking the name up, TCP, the proxy and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an upstream connection may be silent before the kernel asks whether the peer is there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);

/// How long between such questions, and how many go unanswered before the connection is dead.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// A connection to the upstream, with TLS unless it is on loopback.
pub type Stream = Box<dyn Io>;

/// What [`Stream`] can do.
pub trait Io: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

/// Makes connections to one target.
pub struct Connector {
    origin: Uri,
    http: HttpConnector,
    /// The way through a proxy, if there is one.
    tunnel: Option<Tunnel<HttpConnector>>,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    /// Who may own a plain upstream's end of a connection: any local user can listen on a loopback port.
    pub owner: Option<PeerCheck>,
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
        let tunnel = proxy.map(|proxy| {
            let tunnel = Tunnel::new(proxy.uri().clone(), http.clone());
            match proxy.basic_auth() {
                Some(auth) => tunnel.with_auth(auth.clone()),
                None => tunnel,
            }
        });
        let tls = TlsConnector::from(Arc::new(client_config(ca_file)?));
        let name = target.tls_name.clone().map(ServerName::try_from);
        let unusable = |_| "--upstream-url has a host for which there is no certificate";
        let name = name.transpose().map_err(unusable)?;
        Ok(Self {
            origin: target.origin.clone(),
            http,
            tunnel,
            tls: name.map(|name| (tls, name)),
            owner: None,
        })
    }

    /// Makes the TLS library's random generator ready.
    ///
    /// It gathers entropy when it is first used, which takes some 40 ms of CPU: better now than in
    /// the first request, and better after the socket listens than before.
    pub fn seed_rng(&self) {
        if let Some((connector, _)) = &self.tls {
            let provider = connector.config().crypto_provider();
            let _ = provider.secure_random.fill(&mut [0]);
        }
    }

    /// Connects within [`CONNECT_TIMEOUT`].
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub(super) async fn connect(&self) -> Result<Stream, Failure> {
        let connecting = timeout(CONNECT_TIMEOUT, self.connect_unbounded());
        connecting.await.unwrap_or_else(|elapsed| {
            let message = "connecting to the upstream took longer than 10 s (connect)";
            Err(Failure {
                status: StatusCode::GATEWAY_TIMEOUT,
                ..Failure::unreachable(message)(elapsed)
            })
        })
    }

    async fn connect_unbounded(&self) -> Result<Stream, Failure> {
        let origin = self.origin.clone();
        let tcp = match &self.tunnel {
            None => self.http.clone().call(origin).await.map_err(no_socket)?,
            Some(tunnel) => {
                let message = "the proxy on the way to the upstream made no tunnel (proxy)";
                let tunnel = tunnel.clone().call(origin).await;
                tunnel.map_err(Failure::unreachable(message))?
            }
        }
        .into_inner();
        if let Some((tls, name)) = &self.tls {
            let message = "no secure connection to the upstream could be made (TLS)";
            let stream = tls.connect(name.clone(), tcp).await;
            return Ok(Box::new(stream.map_err(Failure::unreachable(message))?));
        }
        // The name was one of loopback, but a name is only a name.
        let address = tcp.peer_addr().map_err(no_socket)?;
        if !address.ip().to_canonical().is_loopback() {
            let error = io::Error::other(format!("{address} is not this machine's loopback"));
            return Err(Failure::unreachable(NO_SOCKET)(error));
        }
        if let Some(owner) = &self.owner
            && let (uid, false) = owner.identify(&tcp).await
        {
            let uid = log::uid(uid);
            let detail = format!("uid={uid}; if that is the upstream, use --upstream-user");
            let message = "the upstream belongs to a user who is not trusted (owner)";
            return Err(Failure::unreachable(message)(io::Error::other(detail)));
        }
        Ok(Box::new(tcp))
    }
}

/// What a client is told where there is no socket.
const NO_SOCKET: &str = "the upstream could not be reached (connect)";

/// No socket to the upstream, or no address. A name that isn't found is told by having no error number:
/// getaddrinfo(3) has codes of its own, and whatever fails behind it has one.
fn no_socket<E: Error + 'static>(error: E) -> Failure {
    let mut causes = std::iter::successors(Some(&error as &(dyn Error + 'static)), |&error| {
        error.source()
    });
    let cause = causes.find_map(|cause| cause.downcast_ref::<io::Error>());
    Failure::unreachable(match cause.map(io::Error::raw_os_error) {
        Some(None) => "the upstream's name could not be resolved (DNS)",
        _ => NO_SOCKET,
    })(error)
}

/// TLS 1.2 and 1.3 with Mozilla's roots and those in `ca_file`; HTTP/1.1 is all that is spoken.
fn client_config(ca_file: Option<&Path>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(path) = ca_file {
        add_roots(path, &mut roots).map_err(|what| {
            let path = path.display();
            format!("--upstream-ca {path}: {what}; give a file with one or more PEM certificates")
        })?;
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

/// Adds the certificates in a PEM file.
fn add_roots(path: &Path, roots: &mut RootCertStore) -> Result<(), Box<dyn Error>> {
    let before = roots.len();
    for certificate in CertificateDer::pem_file_iter(path)? {
        roots.add(certificate?)?;
    }
    match roots.len() - before {
        0 => Err("no certificate found".into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connecting_has_10_seconds() {
        // The kernel makes the connection; nobody ever says a word of TLS.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}/", silent.local_addr().unwrap());
        let connector = Connector::new(&Target::parse(&url).unwrap(), None, None).unwrap();
        let begun = Instant::now();
        let failure = connector.connect().await.err().unwrap();
        let lasted = begun.elapsed().as_millis();
        assert!((10_000..10_010).contains(&lasted), "{lasted} ms");
        assert_eq!(failure.status, StatusCode::GATEWAY_TIMEOUT);
        assert!(failure.message.contains("10 s (connect)"));
    }
}
