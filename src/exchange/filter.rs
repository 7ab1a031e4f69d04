//! Decides which requests are forwarded.

use std::num::NonZeroU16;

use hyper::header::{self, HeaderValue};
use hyper::{Method, StatusCode, Version, http::request::Parts};

use super::{connection_state::Peer, headers::named_by_connection};
use crate::error::ErrorReply;
use crate::upstream::{Kind, is_only, target::is_loopback};

/// The one path that is forwarded.
const PATH: &str = "/v1/responses";

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
// The messages of the other rejections.
const FROM_BROWSER: &str = "this proxy serves local programs, not web pages: requests with an Origin or Sec-Fetch-Site header are rejected";
const OTHER_HOST: &str = "the Host header must name this machine: localhost or a loopback address";
const HOST_COUNT: &str = "an HTTP/1.1 request must have exactly one Host header";
const TRANSFER_CODING: &str = "unsupported Transfer-Encoding: only chunked is accepted";
const LENGTH_TOO_LARGE: &str = "the Content-Length is 2^63 or more";
const NOT_FORWARDED: &str = "this proxy forwards only POST /v1/responses without a query, and WebSocket handshakes on it if started with --websocket";
const NOT_DUMPED: &str = "this proxy was started with --dump-dir and forwards no WebSocket handshakes: use POST /v1/responses";

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
pub(super) fn decide(request: &Parts, peer: Peer, allowed: Allowed) -> Result<Route, ErrorReply> {
    let headers = &request.headers;
    if let Some(denial) = peer.denial {
        return Err(denial.clone());
    }
    // Only browsers send these headers. A page's script can neither omit nor forge them (Fetch standard,
    // forbidden request headers).
    if headers.contains_key(header::ORIGIN) || headers.contains_key("sec-fetch-site") {
        return Err(ErrorReply::forbidden("browser_not_allowed", FROM_BROWSER));
    }
    // A page whose own name was rebound to loopback sends that name. HTTP/1.1 requires exactly one
    // (RFC 9112, section 3.2); HTTP/1.0 has no such header.
    let mut hosts = headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if request.version == Version::HTTP_10 => {}
        (Some(host), None) if is_loopback_host(host) => {}
        (Some(_), None) => return Err(ErrorReply::forbidden("host_not_allowed", OTHER_HOST)),
        _ => return Err(ErrorReply::bad_request(HOST_COUNT)),
    }
    // The header is not forwarded, so any other coding would make the body unreadable.
    if is_only(headers, header::TRANSFER_ENCODING, "chunked") == Some(false) {
        return Err(ErrorReply::bad_request(TRANSFER_CODING));
    }
    // Some readers parse it as a signed number.
    let length = headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    if length > Some(i64::MAX as u64) {
        return Err(ErrorReply::bad_request(LENGTH_TOO_LARGE));
    }
    // Only an absolute-form target has a scheme, and one of an authority alone has no path. The path is
    // compared byte for byte.
    let uri = &request.uri;
    let target = uri.path_and_query().filter(|_| uri.scheme().is_none());
    let is_handshake = allowed.websocket && is_handshake(request);
    match (&request.method, target.map(|target| target.as_str())) {
        (&Method::POST, Some(PATH)) => Ok(Route::Forward(Kind::Post)),
        // On this error, Codex uses POST at once.
        (&Method::GET, Some(PATH)) if is_handshake && allowed.is_dumping => {
            let status = StatusCode::UPGRADE_REQUIRED;
            Err(ErrorReply::new(status, "websocket_not_dumped", NOT_DUMPED))
        }
        (&Method::GET, Some(PATH)) if is_handshake => Ok(Route::Forward(Kind::Handshake)),
        (&Method::GET, Some("/shutdown")) if allowed.http_shutdown => Ok(Route::Shutdown),
        _ => Err(ErrorReply::forbidden("not_allowed", NOT_FORWARDED)),
    }
}

/// Whether a GET request is a WebSocket handshake and nothing more (RFC 6455, section 4.1). The upstream
/// checks key, version and extensions.
fn is_handshake(request: &Parts) -> bool {
    let headers = &request.headers;
    request.version == Version::HTTP_11
        && !headers.contains_key(header::CONTENT_LENGTH)
        && !headers.contains_key(header::TRANSFER_ENCODING)
        && is_only(headers, header::UPGRADE, "websocket") == Some(true)
        && named_by_connection(headers).any(|name| name == header::UPGRADE)
}

/// `localhost` or a loopback address, with or without a port.
fn is_loopback_host(host: &HeaderValue) -> bool {
    let host = host.to_str().unwrap_or_default();
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.parse::<NonZeroU16>().is_ok() => name,
        _ => host,
    };
    let in_brackets = name.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
    // IPv6 addresses stand in brackets, and nothing else does.
    in_brackets.is_some() == name.contains(':') && is_loopback(in_brackets.unwrap_or(name))
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
            ("9223372036854775808", Some(LENGTH_TOO_LARGE)),
            ("18446744073709551613", Some(LENGTH_TOO_LARGE)),
        ] {
            let headers = [("host", "localhost"), ("content-length", length)];
            let decision = decide(
                &head("POST", PATH, &headers),
                Peer::default(),
                Allowed::default(),
            );
            let message = decision.err().map(|reply| reply.message);
            assert_eq!(message, expected, "{length}");
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
