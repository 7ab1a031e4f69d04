//! Decides which requests are forwarded.

use hyper::header::{self, HeaderValue};
use hyper::{Method, StatusCode, Version};
use hyper::{http::request::Parts, http::uri::Authority};

use super::{connection_state::Peer, headers::named_by_connection};
use crate::error::ErrorReply;
use crate::upstream::target::{is_loopback, usable_port};
use crate::upstream::{Kind, is_only};

/// The one path that is forwarded.
const PATH: &str = "/v1/responses";

/// Starts shutdown, with `--http-shutdown`.
const SHUTDOWN_PATH: &str = "/shutdown";

/// Headers that only browsers send. A page's script can neither omit nor forge them (Fetch standard,
/// forbidden request headers).
const BROWSER_HEADERS: [&str; 2] = ["origin", "sec-fetch-site"];

/// The response to denied users.
pub(crate) static USER_NOT_ALLOWED: ErrorReply = ErrorReply::forbidden(
    "user_not_allowed",
    "this user is not allowed, or disconnected before being identified",
);
/// The response to users who have their share of the connections.
pub(crate) static TOO_MANY_CONNECTIONS: ErrorReply = ErrorReply::new(
    StatusCode::SERVICE_UNAVAILABLE,
    "too_many_connections",
    "this user holds half of all connections, the most for one user: close some",
);
static BROWSER_REQUEST: ErrorReply = ErrorReply::forbidden(
    "browser_not_allowed",
    "this proxy serves local programs, not web pages: requests with an Origin or Sec-Fetch-Site header are rejected",
);
static HOST_NOT_LOOPBACK: ErrorReply = ErrorReply::forbidden(
    "host_not_allowed",
    "the Host header must name this machine: localhost or a loopback address",
);
static HOST_COUNT: ErrorReply =
    ErrorReply::bad_request("an HTTP/1.1 request must have exactly one Host header");
static UNSUPPORTED_TRANSFER_ENCODING: ErrorReply =
    ErrorReply::bad_request("unsupported Transfer-Encoding: only chunked is accepted");
static LENGTH_TOO_LARGE: ErrorReply = ErrorReply::bad_request("the Content-Length is 2^63 or more");
static NOT_FORWARDED: ErrorReply = ErrorReply::forbidden(
    "not_allowed",
    "this proxy forwards only POST /v1/responses without a query, and WebSocket handshakes on it if started with --websocket",
);
static NOT_DUMPED: ErrorReply = ErrorReply::new(
    StatusCode::UPGRADE_REQUIRED,
    "websocket_not_dumped",
    "this proxy was started with --dump-dir and forwards no WebSocket handshakes: use POST /v1/responses",
);

/// The requests allowed in addition to `POST /v1/responses`.
#[derive(Clone, Copy, Default)]
pub(crate) struct Allowed {
    /// `GET /shutdown` ends the process.
    pub(crate) http_shutdown: bool,
    /// WebSocket handshakes are forwarded.
    pub(crate) websocket: bool,
    /// Exchanges are dumped, which tunnels cannot be: their frames are masked and may be compressed.
    pub(crate) is_dumping: bool,
}

/// The route of a request that isn't rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// It is forwarded.
    Forward(Kind),
    /// It starts shutdown.
    Shutdown,
}

/// Decides by the peer and the request's head alone.
pub(super) fn decide(
    request: &Parts,
    peer: Peer,
    allowed: Allowed,
) -> Result<Route, &'static ErrorReply> {
    let headers = &request.headers;
    if let Some(denial) = peer.denial {
        return Err(denial);
    }
    let is_there = |name: &&str| headers.contains_key(*name);
    if BROWSER_HEADERS.iter().any(is_there) {
        return Err(&BROWSER_REQUEST);
    }
    // A page whose own name was rebound to loopback sends that name. HTTP/1.1 requires exactly one
    // (RFC 9112, section 3.2); HTTP/1.0 has no such header.
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if request.version == Version::HTTP_10 => {}
        (Some(host), None) if is_loopback_host(host) => {}
        (Some(_), None) => return Err(&HOST_NOT_LOOPBACK),
        _ => return Err(&HOST_COUNT),
    }
    // The header is not forwarded, so any other coding would make the body unreadable.
    if is_only(headers, header::TRANSFER_ENCODING, "chunked") == Some(false) {
        return Err(&UNSUPPORTED_TRANSFER_ENCODING);
    }
    // Some readers parse it as a signed number.
    let length = headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    if length > Some(i64::MAX as u64) {
        return Err(&LENGTH_TOO_LARGE);
    }
    // An absolute-form target has a scheme and an authority. The path is compared byte for byte.
    let uri = &request.uri;
    let is_origin_form = uri.authority().is_none() && uri.scheme().is_none();
    let target = uri.path_and_query().filter(|_| is_origin_form);
    match (&request.method, target.map(|target| target.as_str())) {
        (&Method::POST, Some(PATH)) => Ok(Route::Forward(Kind::Post)),
        (&Method::GET, Some(PATH)) if !allowed.websocket || !is_handshake(request) => {
            Err(&NOT_FORWARDED)
        }
        // On this error, Codex uses POST at once.
        (&Method::GET, Some(PATH)) if allowed.is_dumping => Err(&NOT_DUMPED),
        (&Method::GET, Some(PATH)) => Ok(Route::Forward(Kind::Handshake)),
        (&Method::GET, Some(SHUTDOWN_PATH)) if allowed.http_shutdown => Ok(Route::Shutdown),
        _ => Err(&NOT_FORWARDED),
    }
}

/// Whether a GET request is a WebSocket handshake and nothing more (RFC 6455, section 4.1). The upstream
/// checks key, version and extensions.
fn is_handshake(request: &Parts) -> bool {
    let headers = &request.headers;
    let mut connection = headers.get_all(header::CONNECTION).iter();
    request.version == Version::HTTP_11
        && !headers.contains_key(header::CONTENT_LENGTH)
        && !headers.contains_key(header::TRANSFER_ENCODING)
        && is_only(headers, header::UPGRADE, "websocket") == Some(true)
        && connection.any(|value| named_by_connection(value).any(|name| name == header::UPGRADE))
}

/// `localhost` or a loopback address, with or without a port.
fn is_loopback_host(host: &HeaderValue) -> bool {
    let Ok(authority) = Authority::try_from(host.as_bytes()) else {
        return false;
    };
    let name = authority.host();
    let in_brackets = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    let is_here = match in_brackets {
        Some(address) => address.contains(':') && is_loopback(address),
        None => is_loopback(name),
    };
    is_here && usable_port(&authority, 80).is_some() && !authority.as_str().contains('@')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(method: &str, target: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = hyper::Request::builder().method(method).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn accepts_loopback_hosts() {
        for host in [
            "localhost",
            "LOCALHOST:8399",
            "127.0.0.1",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]",
            "[::1]:8399",
        ] {
            let request = head("POST", PATH, &[("host", host)]);
            assert_eq!(
                decide(&request, Peer::default(), Allowed::default()),
                Ok(Route::Forward(Kind::Post)),
                "{host}"
            );
        }
    }

    #[test]
    fn rejects_non_loopback_hosts() {
        let hosts = [
            "",
            ":8399",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "localhost:",
            "localhost:x",
            "localhost:80:80",
            "::1",
            "[::1",
            "[::1]x",
            "[127.0.0.1]",
            "[localhost]",
            "0.0.0.0",
            "[::]",
            "127.1",
            "2130706433",
            "10.0.0.1",
            "localhost@evil.example",
            "user@localhost",
            "localhost.",
            "[::ffff:127.0.0.1]",
        ];
        for host in hosts {
            let request = head("POST", PATH, &[("host", host)]);
            let Err(refusal) = decide(&request, Peer::default(), Allowed::default()) else {
                panic!("{host}: not refused")
            };
            assert_eq!(refusal.code, "host_not_allowed", "{host}");
        }
    }

    #[test]
    fn lengths_from_2_to_the_63_are_malformed() {
        for (length, expected) in [
            ("0", None),
            ("9223372036854775807", None),
            ("9223372036854775808", Some(&LENGTH_TOO_LARGE)),
            ("18446744073709551613", Some(&LENGTH_TOO_LARGE)),
        ] {
            let headers = [("host", "localhost"), ("content-length", length)];
            let decision = decide(
                &head("POST", PATH, &headers),
                Peer::default(),
                Allowed::default(),
            );
            assert_eq!(decision.err(), expected, "{length}");
        }
    }

    #[test]
    fn shutdown_needs_the_flag_and_the_exact_request() {
        let local = [("host", "localhost")];
        let allowed = |http_shutdown| Allowed {
            http_shutdown,
            ..Allowed::default()
        };
        assert_eq!(
            decide(
                &head("GET", "/shutdown", &local),
                Peer::default(),
                allowed(true)
            ),
            Ok(Route::Shutdown)
        );
        for (method, target, enabled) in [
            ("GET", "/shutdown", false),
            ("POST", "/shutdown", true),
            ("GET", "/shutdown?", true),
            ("GET", "/shutdown/", true),
        ] {
            assert!(
                decide(
                    &head(method, target, &local),
                    Peer::default(),
                    allowed(enabled)
                )
                .is_err(),
                "{method} {target}"
            );
        }
    }
}
