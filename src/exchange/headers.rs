//! Headers on their way through: end-to-end ones pass, the others end here.

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Whether a header is about one connection and not about the message (RFC 9110, sections 7.6.1, 11.7
/// and 6.6.2): those that a proxy must not pass on, whether `Connection` names them or not. `name` is
/// in lower case.
///
/// `Trailer` is among them because trailer fields are left out, see [`crate::body`].
fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
    )
}

/// What else of a client's request does not go up: the first two are replaced, and the client has its
/// 100 (Continue) from us.
fn is_replaced(name: &str) -> bool {
    matches!(name, "authorization" | "host" | "expect")
}

/// The headers of a request for the upstream: the client's end-to-end ones in their order, behind a
/// `Host` of ours. The credential is added later, on the wire.
pub(super) fn for_upstream(client: HeaderMap, host: &HeaderValue) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(client.len() + 1);
    headers.insert(header::HOST, host.clone());
    pass(client, &mut headers, is_replaced);
    headers
}

/// The end-to-end headers of an answer, in their order.
pub(super) fn end_to_end(upstream: HeaderMap) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(upstream.len());
    pass(upstream, &mut headers, |_| false);
    headers
}

/// Moves end-to-end headers, but for those that `ends_here`.
fn pass(from: HeaderMap, to: &mut HeaderMap, ends_here: impl Fn(&str) -> bool) {
    let disowned: Vec<HeaderName> = from
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| named_by_connection(value.as_bytes()))
        .collect();
    // The name comes with the first of its values only.
    let mut current = None;
    for (name, value) in from {
        if let Some(name) = name {
            let text = name.as_str();
            let passes = !is_hop_by_hop(text) && !ends_here(text) && !disowned.contains(&name);
            current = passes.then_some(name);
        }
        if let Some(name) = &current {
            to.append(name, value);
        }
    }
}

/// The headers that a `Connection` header says are about the connection (RFC 9110, section 7.6.1).
///
/// `Content-Length` can't be disowned in this way: without it the message would be another one; that
/// section speaks of fields "intended solely for the immediate recipient".
fn named_by_connection(value: &[u8]) -> impl Iterator<Item = HeaderName> {
    value
        .split(|&byte| byte == b',')
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .filter(|name| name != header::CONTENT_LENGTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(headers: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = headers.iter().map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        });
        let mut map = HeaderMap::new();
        pairs.for_each(|(name, value)| _ = map.append(name, value));
        map
    }

    #[test]
    fn end_to_end_headers_go_up_in_order() {
        let client = map(&[
            ("host", "localhost:1"),
            ("b", "1"),
            ("authorization", "Bearer theirs"),
            ("a", "1"),
            ("b", "2"),
            ("authorization", "Bearer theirs again"),
            ("expect", "100-continue"),
            ("connection", "close, X-Mine ,content-length"),
            ("connection", "keep-alive, authorization"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("proxy-authorization", "Basic x"),
            ("content-length", "5"),
        ]);
        let headers = for_upstream(client, &HeaderValue::from_static("up"));
        let names: Vec<_> = headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.to_str().unwrap()))
            .collect();
        let expected = [
            ("host", "up"),
            ("b", "1"),
            ("b", "2"),
            ("a", "1"),
            ("content-length", "5"),
        ];
        assert_eq!(names, expected);
    }
}
