//! The upstream URL.

use std::{net::IpAddr, num::NonZeroU16};

use hyper::{Uri, header::HeaderValue, http::uri::Authority};
use rustls::pki_types::ServerName;

/// The parts of the URL, parsed once at startup.
#[derive(Debug)]
pub(crate) struct Target {
    /// Scheme and authority, for connecting.
    pub(crate) origin: Uri,
    /// Path and query, as in the request line (origin-form, RFC 9112, section 3.2.1).
    pub(crate) origin_form: Uri,
    /// Host, and the port unless it is the scheme's default.
    pub(crate) host_header: HeaderValue,
    /// The name that the upstream's certificate must have; `None` means no TLS.
    pub(crate) tls_name: Option<ServerName<'static>>,
}

impl Target {
    /// Parses `--upstream-url`. An error does not repeat the URL, which may contain a secret.
    pub(crate) fn parse(url: &str) -> Result<Self, String> {
        Self::parse_url(url.trim()).map_err(|what| format!("--upstream-url {what}"))
    }

    fn parse_url(url: &str) -> Result<Self, &'static str> {
        if url.contains('#') {
            return Err("has a fragment ('#'), which is never sent to a server: leave it out");
        }
        let example = "must be a URL such as https://api.openai.com/v1/responses";
        let uri: Uri = url.parse().map_err(|_| example)?;
        let scheme = uri.scheme_str().ok_or(example)?;
        let authority = uri.authority().ok_or(example)?;
        if authority.as_str().contains('@') {
            return Err("has user info ('@'): leave it out, the key comes from stdin");
        }
        let host = authority.host().to_ascii_lowercase();
        let bare_host = host.trim_matches(['[', ']']);
        let default_port = match scheme {
            "https" => 443,
            "http" if is_loopback(bare_host) => 80,
            "http" => return Err("would expose the key: use https:// (http:// only to loopback)"),
            _ => return Err("must begin with https:// (or http:// to a loopback host)"),
        };
        let unusable = "has no host or an invalid port";
        let host_header = match usable_port(authority, default_port).ok_or(unusable)? {
            port if port == default_port => host.clone(),
            port => format!("{host}:{port}"),
        };
        let tls_name = (scheme == "https").then(|| bare_host.to_owned().try_into());
        let invalid_name = |_| "has a host that is not a valid TLS server name";
        let origin = format!("{scheme}://{host_header}/");
        // As text, the path of a URL such as `https://host?a=b` begins with a slash as well.
        let origin_form = uri.path_and_query().ok_or(example)?.to_string();
        Ok(Self {
            origin: origin.parse().map_err(|_| unusable)?,
            origin_form: origin_form.parse().map_err(|_| unusable)?,
            host_header: host_header.parse().map_err(|_| unusable)?,
            tls_name: tls_name.transpose().map_err(invalid_name)?,
        })
    }
}

/// The port to connect to; `None` without a host, with user info or with an invalid port.
pub(crate) fn usable_port(authority: &Authority, default: u16) -> Option<u16> {
    match authority.as_str().strip_prefix(authority.host())? {
        _ if authority.host().is_empty() => None,
        "" => Some(default),
        port => Some(port.strip_prefix(':')?.parse::<NonZeroU16>().ok()?.get()),
    }
}

/// Whether `host` can only be this machine: `localhost` (RFC 6761, section 6.3) or a loopback address.
pub(crate) fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_urls() {
        let cases = [
            (
                "https://api.openai.com/v1/responses",
                "https://api.openai.com/",
                "/v1/responses",
                "api.openai.com",
            ),
            (
                "https://x.azure.com/a/responses?api-version=1&b",
                "https://x.azure.com/",
                "/a/responses?api-version=1&b",
                "x.azure.com",
            ),
            (
                "HTTPS://API.OpenAI.com:443/V1",
                "https://api.openai.com/",
                "/V1",
                "api.openai.com",
            ),
            ("https://host:8443", "https://host:8443/", "/", "host:8443"),
            ("https://host?a=b", "https://host/", "/?a=b", "host"),
            ("https://[::1]:9/x", "https://[::1]:9/", "/x", "[::1]:9"),
            (
                "http://127.0.0.1:80/x",
                "http://127.0.0.1/",
                "/x",
                "127.0.0.1",
            ),
            (
                "http://LOCALHOST:81/x",
                "http://localhost:81/",
                "/x",
                "localhost:81",
            ),
            ("http://[::1]:81/x", "http://[::1]:81/", "/x", "[::1]:81"),
        ];
        for (url, origin, origin_form, host) in cases {
            let target = Target::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(target.origin.to_string(), origin, "{url}");
            assert_eq!(target.origin_form.to_string(), origin_form, "{url}");
            assert_eq!(target.host_header, host, "{url}");
            assert_eq!(
                target.tls_name.is_some(),
                origin.starts_with("https"),
                "{url}"
            );
        }
    }

    #[test]
    fn rejects_unusable_urls_without_repeating_them() {
        let cases = [
            ("empty", ""),
            ("relative", "/v1/secret"),
            ("no scheme", "secret.example/v1"),
            ("other scheme", "ftp://secret.example/v1"),
            ("http to another host", "http://secret.example/v1"),
            (
                "http to a name like localhost",
                "http://localhost.secret.example/v1",
            ),
            ("user info", "https://secret@host/v1"),
            ("user and password", "https://u:secret@host/v1"),
            ("fragment", "https://host/v1#secret"),
            ("space", "https://host/a secret"),
            ("no host", "https:///secret"),
            ("empty port", "https://host:/secret"),
            ("port 0", "https://host:0/secret"),
            ("port too large", "https://host:65536/secret"),
        ];
        for (name, url) in cases {
            let error = Target::parse(url)
                .err()
                .unwrap_or_else(|| panic!("{name}: accepted"));
            assert!(
                error.contains("--upstream-url") && !error.contains("secret"),
                "{name}: {error}"
            );
        }
    }
}
