//! Headers on their way through: end-to-end ones pass, the others end here.

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};

/// How much memory a head is given at first, in bytes: most are smaller.
pub const USUAL_HEAD_BYTES: usize = 1 << 10;

/// Whether a header is about one connection and not about the message (RFC 9110, sections 7.6.1, 11.7
/// and 6.6.2): those that a proxy must not pass on, whether `Connection` names them or not. `name` is
/// in lower case.
///
/// `Trailer` is among them because trailer fields are left out, see [`crate::body`].
#[must_use]
pub fn is_hop_by_hop(name: &str) -> bool {
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

/// Writes headers of a request for the upstream to `head`: the client's end-to-end ones in their
/// order, behind a `Host` of ours.
pub fn write_for_upstream(client: &HeaderMap, host: &HeaderValue, head: &mut Vec<u8>) {
    write("host", host.as_bytes(), head);
    let disowned: Vec<HeaderName> = client
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| named_by_connection(value.as_bytes()))
        .collect();
    for (name, value) in client {
        let text = name.as_str();
        if !is_hop_by_hop(text) && !is_replaced(text) && !disowned.contains(name) {
            write(text, value.as_bytes(), head);
        }
    }
}

/// Writes one header to `head`.
pub fn write(name: &str, value: &[u8], head: &mut Vec<u8>) {
    for part in [name.as_bytes(), b": ", value, b"\r\n"] {
        head.extend_from_slice(part);
    }
}

/// What a `Connection` header lists (RFC 9110, section 7.6.1).
fn connection_options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii)
}

/// Whether a `Connection` header says that there is no next message.
#[must_use]
pub fn closes(value: &[u8]) -> bool {
    connection_options(value).any(|option| option.eq_ignore_ascii_case(b"close"))
}

/// The headers that a `Connection` header says are about the connection.
///
/// `Content-Length` can't be disowned in this way: without it the message would be another one
/// (RFC 9110, section 7.6.1, speaks of fields "intended solely for the immediate recipient").
pub fn named_by_connection(value: &[u8]) -> impl Iterator<Item = HeaderName> {
    connection_options(value)
        // What most of them say, and a header that doesn't pass in any case.
        .filter(|name| !name.eq_ignore_ascii_case(b"keep-alive"))
        .filter_map(|name| HeaderName::from_bytes(name).ok())
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
        let mut head = Vec::new();
        write_for_upstream(&client, &HeaderValue::from_static("up"), &mut head);
        let expected = "host: up\r\nb: 1\r\nb: 2\r\na: 1\r\ncontent-length: 5\r\n";
        assert_eq!(
            head.escape_ascii().to_string(),
            expected.escape_default().to_string()
        );
    }
}
