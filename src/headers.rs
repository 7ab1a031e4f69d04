//! Headers on their way through: end-to-end ones pass, the others end here.

use hyper::header::{self, Entry, HeaderMap, HeaderName, HeaderValue, OccupiedEntry};

/// Headers that are about one connection and not about the message (RFC 9110, sections 7.6.1, 11.7
/// and 6.6.2): the ones that a proxy must not pass on, whether `Connection` names them or not.
///
/// `Trailer` is among them because trailer fields are left out, see [`crate::body`].
const HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// What else of a client's request does not go up: the first two are replaced, and the client has its
/// 100 (Continue) from us.
const REPLACED: [HeaderName; 3] = [header::AUTHORIZATION, header::HOST, header::EXPECT];

/// Headers of a request for the upstream: the client's end-to-end ones in their order, behind an
/// `Authorization` and a `Host` of ours.
///
/// `Authorization` comes first so that its placeholder is found early.
#[must_use]
pub fn for_upstream(
    client: HeaderMap,
    authorization: HeaderValue,
    host: &HeaderValue,
) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(client.keys_len() + 2);
    headers.insert(header::AUTHORIZATION, authorization);
    headers.insert(header::HOST, host.clone());
    pass_on(client, &mut headers, |name| REPLACED.contains(name));
    headers
}

/// Headers of an answer for the client: the upstream's end-to-end ones in their order.
#[must_use]
pub fn for_client(upstream: HeaderMap) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(upstream.keys_len());
    pass_on(upstream, &mut headers, |_| false);
    headers
}

/// Moves the end-to-end headers over; a removal in place would change their order.
fn pass_on(from: HeaderMap, to: &mut HeaderMap, ends_here: impl Fn(&HeaderName) -> bool) {
    let disowned = named_by_connection(&from);
    let is_passed = |name: &HeaderName| {
        !HOP_BY_HOP.contains(name) && !disowned.contains(name) && !ends_here(name)
    };
    // The entry of the last header that passes: where its name is repeated, there comes no name.
    let mut last: Option<OccupiedEntry<'_, HeaderValue>> = None;
    for (name, value) in from {
        match name {
            Some(name) if is_passed(&name) => {
                last = match to.entry(name) {
                    Entry::Vacant(entry) => Some(entry.insert_entry(value)),
                    Entry::Occupied(_) => None,
                };
            }
            Some(_) => last = None,
            None => last
                .iter_mut()
                .for_each(|entry| entry.append(value.clone())),
        }
    }
}

/// The headers that `Connection` says are about the connection.
///
/// `Content-Length` can't be disowned in this way: without it the message would be another one
/// (RFC 9110, section 7.6.1, speaks of fields "intended solely for the immediate recipient").
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .filter(|name| name != header::CONTENT_LENGTH)
        .collect()
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
        let up = for_upstream(
            client,
            HeaderValue::from_static("ours"),
            &HeaderValue::from_static("up"),
        );
        let expected = map(&[
            ("authorization", "ours"),
            ("host", "up"),
            ("b", "1"),
            ("b", "2"),
            ("a", "1"),
            ("content-length", "5"),
        ]);
        assert_eq!(
            up.iter().collect::<Vec<_>>(),
            expected.iter().collect::<Vec<_>>()
        );
    }
}
