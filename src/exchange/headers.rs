//! Which headers are forwarded.

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::upstream::Kind;

/// Whether a header belongs to one connection and not to the message (RFC 9110, sections 7.6.1, 11.7 and
/// 6.6.2). A proxy must not forward it, whether `Connection` names it or not.
///
/// `Trailer` is one of them because trailer fields are not forwarded, see [`super::body`].
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
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

/// The headers of a forwarded request: the client's end-to-end ones, with the upstream's `Host`. The stream
/// adds the credential later. `Expect` is left out because hyper sends the 100 (Continue).
pub(super) fn for_upstream(client: HeaderMap, host: HeaderValue, kind: Kind) -> HeaderMap {
    let mut headers = end_to_end(client, &[header::AUTHORIZATION, header::EXPECT]);
    headers.insert(header::HOST, host);
    if kind == Kind::Handshake {
        switch_protocol(&mut headers);
    }
    headers
}

/// Adds the two headers that switch a connection to a WebSocket (RFC 6455, section 4).
pub(super) fn switch_protocol(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

/// The end-to-end headers of a message in their order, without the `replaced` ones.
pub(super) fn end_to_end(from: HeaderMap, replaced: &[HeaderName]) -> HeaderMap {
    let connection = from.get_all(header::CONNECTION).iter();
    let named: Vec<_> = connection.flat_map(named_by_connection).collect();
    let is_dropped =
        |name: &HeaderName| is_hop_by_hop(name) || replaced.contains(name) || named.contains(name);
    if !from.keys().any(is_dropped) {
        return from;
    }
    // A new map, since removing a header moves others. Only the first of a header's values has the name.
    let mut headers = HeaderMap::with_capacity(from.len());
    let mut current = None;
    for (name, value) in from {
        if let Some(name) = name {
            current = Some(name).filter(|name| !is_dropped(name));
        }
        if let Some(name) = &current {
            headers.append(name, value);
        }
    }
    headers
}

/// The headers that a `Connection` header names (RFC 9110, section 7.6.1).
///
/// `Content-Length` is ignored: without it the message would be another one, and that section is about
/// fields "intended solely for the immediate recipient".
pub(super) fn named_by_connection(value: &HeaderValue) -> impl Iterator<Item = HeaderName> {
    let names = value.as_bytes().split(|&byte| byte == b',');
    names
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
    fn end_to_end_headers_are_forwarded_in_order() {
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
        let headers = for_upstream(client, HeaderValue::from_static("up"), Kind::Post);
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
