//! Connects to the upstream: name resolution, TCP, CONNECT tunnel, TLS.

use std::{error::Error, io, sync::Arc, time::Duration};

use hyper::StatusCode;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::proxy::matcher::Intercept;
use rustls::{CertificateError, ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tower_service::Service;

use super::{connect_tunnel::open_tunnel, target::Target};
use crate::{error::ErrorReply, joining_stream::JoiningStream, log, peer::PeerCheck};

/// How long connecting may take: name resolution, TCP, the outbound proxy and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the addresses of a name may take to connect to, shared equally among those of one family. More
/// than [`CONNECT_TIMEOUT`], so that always the latter elapses where no address replies.
const ADDRESSES_TIMEOUT: Duration = Duration::from_secs(11);

/// How long sent data may stay unacknowledged before the kernel closes an upstream connection (tcp(7),
/// `TCP_USER_TIMEOUT`). By default it retransmits for some 15 minutes.
#[cfg(target_os = "linux")]
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(30);

/// How long an upstream connection may be silent before the kernel probes the peer, how long between
/// probes, and how many unanswered ones close the connection.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

const CONNECT_FAILED: &str = "the upstream could not be reached (connect)";

/// A connection to the upstream, with TLS unless it is on loopback.
pub(crate) type Stream = Box<dyn Io>;

/// The traits of a [`Stream`].
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Io for T {}

/// Connects to one target.
pub(crate) struct Connector {
    pub(crate) target: Target,
    http: HttpConnector,
    proxy: Option<Intercept>,
    tls: TlsConnector,
    /// The owners allowed for a plain upstream: any local user can listen on a loopback port.
    pub(crate) owner: Option<PeerCheck>,
}

impl Connector {
    /// Prepares connections to `target`, through an outbound `proxy` if there is one: with TLS 1.2 or 1.3, for
    /// HTTP/1.1.
    pub(crate) fn new(target: Target, proxy: Option<Intercept>, roots: RootCertStore) -> Self {
        // aws-lc-rs is the only provider compiled in.
        let tls = ClientConfig::builder().with_root_certificates(roots);
        let mut tls = tls.with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self {
            target,
            http: with_options(HttpConnector::new()),
            proxy,
            tls: TlsConnector::from(Arc::new(tls)),
            owner: None,
        }
    }

    /// Seeds the TLS library's random generator.
    ///
    /// It gathers entropy when it is first used, which takes some 40 ms of CPU: better now than in the
    /// first request, and better after the socket listens than before.
    pub(super) fn seed_rng(&self) {
        if self.target.tls_name.is_some() {
            let provider = self.tls.config().crypto_provider();
            let _ = provider.secure_random.fill(&mut [0]);
        }
    }

    /// Connects within [`CONNECT_TIMEOUT`].
    pub(super) async fn connect(&self) -> Result<Stream, ErrorReply> {
        let connecting = timeout(CONNECT_TIMEOUT, self.connect_without_timeout());
        connecting.await.unwrap_or_else(|elapsed| {
            let message = "connecting to the upstream took longer than 10 s (connect)";
            let mut reply = ErrorReply::unreachable(message)(elapsed);
            reply.status = StatusCode::GATEWAY_TIMEOUT;
            Err(reply)
        })
    }

    async fn connect_without_timeout(&self) -> Result<Stream, ErrorReply> {
        let mut http = self.http.clone();
        let origin = self.target.origin.clone();
        let tcp = match &self.proxy {
            None => http.call(origin).await.map_err(connect_error)?.into_inner(),
            Some(proxy) => {
                let message = "the outbound proxy did not establish a CONNECT tunnel (proxy)";
                let tunnel = open_tunnel(http, proxy, &origin).await;
                tunnel.map_err(ErrorReply::unreachable(message))?
            }
        };
        if let Some(name) = self.target.tls_name.clone() {
            let stream = self.tls.connect(name, JoiningStream(tcp)).await;
            return Ok(Box::new(stream.map_err(tls_error)?));
        }
        // The name is one of loopback, but may have resolved to another address.
        let address = tcp.peer_addr().map_err(connect_error)?;
        if !address.ip().to_canonical().is_loopback() {
            let detail = format!("{address} is not a loopback address");
            return Err(ErrorReply::unreachable(CONNECT_FAILED)(detail));
        }
        if let Some(owner) = &self.owner
            && let (uid, false) = owner.identify(&tcp).await
        {
            let uid = log::uid(uid);
            let detail = format!("uid={uid}; if that is the upstream, use --upstream-user");
            let message = "the upstream belongs to a user who is not trusted (owner)";
            return Err(ErrorReply::unreachable(message)(detail));
        }
        Ok(Box::new(tcp))
    }
}

/// Sets the options of sockets to the upstream or the outbound proxy.
fn with_options<R>(mut http: HttpConnector<R>) -> HttpConnector<R> {
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(ADDRESSES_TIMEOUT));
    http.set_keepalive(Some(KEEPALIVE_AFTER));
    http.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    http.set_keepalive_retries(Some(KEEPALIVE_PROBES));
    #[cfg(target_os = "linux")]
    http.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIMEOUT));
    http
}

/// A failed name resolution or TCP connection. The former has no error number, since getaddrinfo(3) has codes
/// of its own; the latter has one, unless an address did not reply in its share of the time.
fn connect_error(error: impl Error + 'static) -> ErrorReply {
    let cause: Option<&io::Error> = error.source().and_then(<dyn Error>::downcast_ref);
    let cause = cause.filter(|cause| cause.kind() != io::ErrorKind::TimedOut);
    let message = match cause.map(io::Error::raw_os_error) {
        Some(None) => "the upstream's name could not be resolved (DNS)",
        _ => CONNECT_FAILED,
    };
    ErrorReply::unreachable(message)(error)
}

/// A failed TLS handshake. If the issuer is unknown, the log says how to trust it.
fn tls_error(error: io::Error) -> ErrorReply {
    let unknown_issuer = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    let is_unknown_issuer = cause == Some(&unknown_issuer);
    let message = "no secure connection to the upstream could be established (TLS)";
    let mut reply = ErrorReply::unreachable(message)(error);
    if is_unknown_issuer {
        reply.detail += "; to trust a company's CA, name its PEM file in --upstream-ca, CODEX_CA_CERTIFICATE or SSL_CERT_FILE";
    }
    reply
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connect_without_a_reply_times_out_after_10_s() {
        // The kernel makes the connection; nobody ever says a word of TLS.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}/", silent.local_addr().unwrap());
        let target = Target::parse(&url).unwrap();
        let connector = Connector::new(target, None, RootCertStore::empty());
        let begun = Instant::now();
        let failure = connector.connect().await.err().unwrap();
        let lasted = begun.elapsed().as_millis();
        assert!((10_000..10_010).contains(&lasted), "{lasted} ms");
        assert_eq!(failure.status, StatusCode::GATEWAY_TIMEOUT);
        assert!(failure.message.contains("10 s (connect)"));
    }

    #[cfg(target_os = "linux")]
    mod sockets {
        use std::net::SocketAddr;
        use std::task::{Context, Poll};

        use hyper::Uri;
        use hyper_util::client::legacy::connect::dns::Name;
        use nix::sys::socket::sockopt::{KeepAlive, TcpUserTimeout};
        use nix::sys::socket::{Backlog, getsockopt};
        use tokio::net::{TcpListener, TcpSocket, TcpStream};

        use super::*;

        /// A name with these addresses.
        #[derive(Clone)]
        struct Addresses(Vec<SocketAddr>);

        impl Service<Name> for Addresses {
            type Response = std::vec::IntoIter<SocketAddr>;
            type Error = io::Error;
            type Future = std::future::Ready<io::Result<Self::Response>>;

            fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }

            fn call(&mut self, _: Name) -> Self::Future {
                std::future::ready(Ok(self.0.clone().into_iter()))
            }
        }

        /// An address that drops packets: its queue of connections is full.
        async fn silent_address() -> (SocketAddr, Vec<TcpStream>, TcpSocket) {
            let socket = TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
            let address = socket.local_addr().unwrap();
            nix::sys::socket::listen(&socket, Backlog::new(0).unwrap()).unwrap();
            let mut waiting = Vec::new();
            while let Ok(Ok(stream)) =
                timeout(Duration::from_millis(1), TcpStream::connect(address)).await
            {
                waiting.push(stream);
            }
            (address, waiting, socket)
        }

        #[tokio::test(start_paused = true)]
        async fn each_address_gets_its_share_of_the_connect_timeout() {
            let (silent, _waiting, _socket) = silent_address().await;
            let second = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let second = second.local_addr().unwrap();
            let resolver = Addresses(vec![silent, second]);
            let mut http = with_options(HttpConnector::new_with_resolver(resolver));
            let begun = Instant::now();
            let stream = http.call(Uri::from_static("http://upstream/")).await;
            assert_eq!(stream.unwrap().inner().peer_addr().unwrap(), second);
            let lasted = begun.elapsed().as_millis();
            assert!((5_500..5_510).contains(&lasted), "{lasted} ms");

            // An address that was silent is not a name that could not be resolved.
            let resolver = Addresses(vec![silent, "127.0.0.1:1".parse().unwrap()]);
            let mut http = with_options(HttpConnector::new_with_resolver(resolver));
            let error = http.call(Uri::from_static("http://upstream/")).await;
            assert_eq!(connect_error(error.unwrap_err()).message, CONNECT_FAILED);
        }

        #[tokio::test]
        async fn sockets_limit_unacknowledged_data_to_30_seconds() {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}/", listener.local_addr().unwrap());
            let mut http = with_options(HttpConnector::new());
            let stream = http.call(url.parse().unwrap()).await.unwrap();
            assert_eq!(getsockopt(stream.inner(), TcpUserTimeout), Ok(30_000));
            assert_eq!(getsockopt(stream.inner(), KeepAlive), Ok(true));
        }
    }
}
