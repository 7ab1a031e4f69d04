//! Which requests go through: exactly one kind.

use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use hyper::http::uri::Authority;
use hyper::{Method, Version};

use super::client::Client;
use super::refusal::Refusal;
use crate::upstream::target::{is_loopback, usable_port};

/// The one path that is forwarded.
const PATH: &str = "/v1/responses";

/// The path that ends the process, where that is enabled.
const SHUTDOWN_PATH: &str = "/shutdown";

/// Headers that only a browser sends, and that a page's script can't leave out or forge
/// (Fetch standard, forbidden request headers).
const BROWSER_HEADERS: [&str; 2] = ["origin", "sec-fetch-site"];

/// What is to be done with a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Decision {
    /// Send it to the upstream.
    Forward,
    /// Answer 200 and end.
    Shutdown,
    /// Answer with this.
    Refuse(Refusal),
}

/// Decides on a request by whose it is and its head alone.
pub(super) fn decide(request: &Parts, client: &Client, http_shutdown: bool) -> Decision {
    let refusal = user_refusal(client)
        .or_else(|| browser_refusal(&request.headers))
        .or_else(|| host_refusal(request))
        .or_else(|| framing_refusal(&request.headers));
    if let Some(refusal) = refusal {
        return Decision::Refuse(refusal);
    }
    // `Uri` keeps scheme and authority of an absolute-form target apart, and the path to the letter.
    let is_origin_form = request.uri.authority().is_none() && request.uri.scheme().is_none();
    let target = request
        .uri
        .path_and_query()
        .filter(|_| is_origin_form)
        .map(|target| target.as_str());
    match (&request.method, target) {
        (&Method::POST, Some(PATH)) => Decision::Forward,
        (&Method::GET, Some(SHUTDOWN_PATH)) if http_shutdown => Decision::Shutdown,
        _ => Decision::Refuse(Refusal::forbidden(
            "not_allowed",
            "this proxy forwards POST /v1/responses, without a query, and nothing else",
        )),
    }
}

/// Refuses a user that `--allow-user` does not name, whatever the request is.
fn user_refusal(client: &Client) -> Option<Refusal> {
    client.is_refused.then_some(Refusal::forbidden(
        "user_not_allowed",
        "this user may not use this proxy, or its connection was closed too early to tell whose it is",
    ))
}

/// Refuses what a web page could make a browser on this machine send.
fn browser_refusal(headers: &HeaderMap) -> Option<Refusal> {
    BROWSER_HEADERS.iter().any(|name| headers.contains_key(*name)).then_some(Refusal::forbidden(
        "browser_not_allowed",
        "this proxy serves local programs, not web pages: requests with an Origin or Sec-Fetch-Site header are refused",
    ))
}

/// Refuses a `Host` that is not this machine: a page whose own name was rebound to loopback sends
/// such. HTTP/1.1 requires exactly one (RFC 9112, section 3.2); HTTP/1.0 knows none.
fn host_refusal(request: &Parts) -> Option<Refusal> {
    let mut hosts = request.headers.get_all(header::HOST).iter();
    match (hosts.next(), hosts.next()) {
        (None, _) if request.version == Version::HTTP_10 => None,
        (Some(host), None) if is_loopback_host(host) => None,
        (Some(_), None) => Some(Refusal::forbidden(
            "host_not_allowed",
            "the Host header must name this machine: localhost or a loopback address",
        )),
        _ => Some(Refusal::malformed(
            "an HTTP/1.1 request has exactly one Host header",
        )),
    }
}

/// `localhost` or a loopback address, and perhaps a port.
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

/// Refuses transfer codings other than chunked: dropping the header would change what the body says.
fn framing_refusal(headers: &HeaderMap) -> Option<Refusal> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    match (codings.next(), codings.next()) {
        (None, _) => None,
        (Some(coding), None) if coding.as_bytes().eq_ignore_ascii_case(b"chunked") => None,
        _ => Some(Refusal::malformed(
            "the only transfer coding understood here is chunked",
        )),
    }
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
    fn hosts_that_are_this_machine() {
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
                decide(&request, &Client::default(), false),
                Decision::Forward,
                "{host}"
            );
        }
    }

    #[test]
    fn hosts_that_are_not() {
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
            let Decision::Refuse(refusal) = decide(&request, &Client::default(), false) else {
                panic!("{host}: not refused")
            };
            assert_eq!(refusal.code, "host_not_allowed", "{host}");
        }
    }

    #[test]
    fn shutdown_only_where_enabled_and_to_the_letter() {
        let local = [("host", "localhost")];
        assert_eq!(
            decide(&head("GET", "/shutdown", &local), &Client::default(), true),
            Decision::Shutdown
        );
        for (method, target, enabled) in [
            ("GET", "/shutdown", false),
            ("POST", "/shutdown", true),
            ("GET", "/shutdown?", true),
            ("GET", "/shutdown/", true),
        ] {
            assert!(
                matches!(
                    decide(&head(method, target, &local), &Client::default(), enabled),
                    Decision::Refuse(_)
                ),
                "{method} {target}"
            );
        }
    }
}
