//! Which headers are forwarded.

use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, PROXY_AUTHENTICATE};
use hyper::header::{HeaderMap, HeaderName, HeaderValue, PROXY_AUTHORIZATION, TE, TRAILER};
use hyper::header::{TRANSFER_ENCODING, UPGRADE};

use crate::upstream::Kind;

/// Whether a header belongs to one connection and not to the message (RFC 9110, sections 7.6.1, 11.7 and
/// 6.6.2). A proxy must not forward it, whether `Connection` names it or not.
///
/// `Trailer` is one of them because trailer fields are not forwarded, see [`super::body`].
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(*name, CONNECTION | TE | TRANSFER_ENCODING | UPGRADE)
        || matches!(*name, TRAILER | PROXY_AUTHENTICATE | PROXY_AUTHORIZATION)
        || matches!(name.as_str(), "keep-alive" | "proxy-connection")
}

/// The headers of a forwarded request: the client's end-to-end ones, with the upstream's `Host`. The stream
/// adds the credential later. `Expect` is left out because hyper sends the 100 (Continue).
pub(super) fn for_upstream(client: HeaderMap, host: HeaderValue, kind: Kind) -> HeaderMap {
    let mut headers = end_to_end(client, &[AUTHORIZATION, EXPECT]);
    headers.insert(HOST, host);
    if kind == Kind::Handshake {
        switch_protocol(&mut headers);
    }
    headers
}

/// Adds the two headers that switch a connection to a WebSocket (RFC 6455, section 4).
pub(super) fn switch_protocol(headers: &mut HeaderMap) {
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
}

/// The end-to-end headers of a message in their order, without the `replaced` ones.
pub(super) fn end_to_end(from: HeaderMap, replaced: &[HeaderName]) -> HeaderMap {
    let named: Vec<_> = named_by_connection(&from).collect();
    let is_dropped =
        |name: &HeaderName| is_hop_by_hop(name) || replaced.contains(name) || named.contains(name);
    if !from.keys().any(is_dropped) {
        return from;
    }
    // A new map, since removing a header moves others. Clones of values share their bytes.
    let mut headers = HeaderMap::with_capacity(from.len());
    let kept = from.iter().filter(|(name, _)| !is_dropped(name));
    headers.extend(kept.map(|(name, value)| (name.clone(), value.clone())));
    headers
}

/// The headers that `Connection` names (RFC 9110, section 7.6.1).
///
/// `Content-Length` is ignored: without it the message would be another one, and that section is about
/// fields "intended solely for the immediate recipient".
pub(super) fn named_by_connection(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> {
    let values = headers.get_all(CONNECTION).iter();
    let names = values.flat_map(|value| value.as_bytes().split(|&byte| byte == b','));
    let names = names.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok());
    names.filter(|name| name != CONTENT_LENGTH)
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
