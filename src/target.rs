//! Where requests go: the upstream URL, and the proxy on the way to it.

use std::ffi::OsString;
use std::net::IpAddr;

use hyper::Uri;
use hyper::header::HeaderValue;
use hyper::http::uri::Authority;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};

/// The upstream, taken apart once at the start.
#[derive(Debug)]
pub struct Target {
    /// Scheme and authority, for connecting.
    pub origin: Uri,
    /// Path and query, as the request line has them (origin-form, RFC 9112, section 3.2.1).
    pub origin_form: Uri,
    /// Host, and the port where it isn't the scheme's own.
    pub host_header: HeaderValue,
    /// The name that the upstream's certificate must have; `None` means no TLS.
    pub tls_name: Option<String>,
}

impl Target {
    /// Parses `--upstream-url`.
    ///
    /// # Errors
    ///
    /// A sentence that doesn't repeat the URL, which may hold a secret that someone put there.
    pub fn parse(url: &str) -> Result<Self, String> {
        let url = url.trim();
        if url.contains('#') {
            return Err(
                "--upstream-url has a fragment ('#'), which no server is ever sent: leave it out"
                    .into(),
            );
        }
        let uri: Uri = url.parse().map_err(|error| {
            format!("--upstream-url is not a usable URL ({error}): give one such as https://api.openai.com/v1/responses")
        })?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err(
                "--upstream-url must be absolute, such as https://api.openai.com/v1/responses"
                    .into(),
            );
        };
        if authority.as_str().contains('@') {
            return Err(
                "--upstream-url has user info ('@'): leave it out, the key comes from stdin".into(),
            );
        }
        let host = authority.host().to_ascii_lowercase();
        let bare_host = host.trim_start_matches('[').trim_end_matches(']');
        let (scheme, default_port) = match scheme.to_ascii_lowercase().as_str() {
            "https" => ("https", 443),
            "http" if is_loopback(bare_host) => ("http", 80),
            "http" => {
                return Err("--upstream-url is http:// to another host, which would show the key to the network: \
                            use https:// (http:// is only for loopback hosts)"
                    .into());
            }
            _ => {
                return Err(
                    "--upstream-url must begin with https:// (or http:// to a loopback host)"
                        .into(),
                );
            }
        };
        let Some(port) = usable_port(authority, default_port) else {
            return Err("--upstream-url has no host, or a port that is none".into());
        };
        let host_and_port = if port == default_port {
            host.clone()
        } else {
            format!("{host}:{port}")
        };
        let unusable = |_| "--upstream-url has a host that can't be used in a request".to_owned();
        let path_and_query = uri.path_and_query().map_or("/", |path| path.as_str());
        Ok(Self {
            origin: format!("{scheme}://{host_and_port}/")
                .parse()
                .map_err(|_| unusable(()))?,
            origin_form: rooted(path_and_query).parse().map_err(|_| unusable(()))?,
            host_header: HeaderValue::from_str(&host_and_port).map_err(|_| unusable(()))?,
            tls_name: (scheme == "https").then(|| bare_host.to_owned()),
        })
    }
}

/// The port to connect to; `None` where there is no host, or something after it that is no port.
fn usable_port(authority: &Authority, default: u16) -> Option<u16> {
    let after_host = authority
        .as_str()
        .rsplit('@')
        .next()?
        .strip_prefix(authority.host())?;
    if authority.host().is_empty() {
        return None;
    }
    match after_host.strip_prefix(':') {
        None => after_host.is_empty().then_some(default),
        Some(port) => port.parse().ok().filter(|&port| port != 0),
    }
}

/// A path for the request line: a URL such as `https://host?a=b` has none of its own.
fn rooted(path_and_query: &str) -> String {
    if path_and_query.starts_with('/') {
        path_and_query.to_owned()
    } else {
        format!("/{path_and_query}")
    }
}

/// Whether `host` can only be this machine: `localhost` (RFC 6761, section 6.3) or a loopback address.
#[must_use]
pub fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// Finds the CONNECT proxy for `target` in `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` or their
/// lower-case forms; `variable` looks one up.
///
/// An upstream without TLS is on loopback and never goes through a proxy: that would show it the key.
///
/// # Errors
///
/// A sentence naming the variable whose value can't be used, which would otherwise be ignored: the
/// key's owner believes that a proxy is in the way.
pub fn outbound_proxy(
    target: &Target,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<Intercept>, String> {
    let lookup = |upper: &str| -> Result<(String, String), String> {
        for name in [upper.to_owned(), upper.to_ascii_lowercase()] {
            if let Some(value) = variable(&name).filter(|value| !value.is_empty()) {
                let value = value
                    .into_string()
                    .map_err(|_| format!("{name} is not UTF-8: correct or unset it"))?;
                return Ok((name, value));
            }
        }
        Ok((upper.to_owned(), String::new()))
    };
    let https = lookup("HTTPS_PROXY")?;
    let all = lookup("ALL_PROXY")?;
    let (no_name, no) = lookup("NO_PROXY")?;
    for (name, value) in [&https, &all] {
        check_proxy(name, value)?;
    }
    for entry in no.split(',').map(str::trim) {
        if !is_no_proxy_entry(entry) {
            return Err(format!(
                "{no_name} has an entry that would match nothing: use host names, addresses, networks such as 10.0.0.0/8, or a '*' alone"
            ));
        }
    }
    if target.tls_name.is_none() {
        return Ok(None);
    }
    Ok(Matcher::builder()
        .https(https.1)
        .all(all.1)
        .no(no)
        .build()
        .intercept(&target.origin))
}

/// Whether the value of a proxy variable is one that this program can follow to the letter.
fn check_proxy(name: &str, value: &str) -> Result<(), String> {
    if value.is_empty() {
        return Ok(());
    }
    let advice = "use a URL such as http://proxy.example:3128, or unset it";
    let uri: Uri = value
        .parse()
        .map_err(|_| format!("{name} is not a usable URL: {advice}"))?;
    if uri.scheme_str().is_some_and(|scheme| scheme != "http") {
        return Err(format!(
            "{name} names a kind of proxy other than http://: {advice}"
        ));
    }
    match uri
        .authority()
        .and_then(|authority| usable_port(authority, 80))
    {
        Some(_) => Ok(()),
        None => Err(format!(
            "{name} has no host, or a port that is none: {advice}"
        )),
    }
}

/// Whether hyper-util's matcher gives the entry the meaning that its author had in mind.
fn is_no_proxy_entry(entry: &str) -> bool {
    let is_network = |entry: &str| {
        entry.split_once('/').is_some_and(|(address, prefix)| {
            let bits = match address.parse() {
                Ok(IpAddr::V4(_)) => 32,
                Ok(IpAddr::V6(_)) => 128,
                Err(_) => return false,
            };
            prefix.parse::<u8>().is_ok_and(|prefix| prefix <= bits)
        })
    };
    let is_name = || {
        entry
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
    };
    entry.is_empty()
        || entry == "*"
        || entry.parse::<IpAddr>().is_ok()
        || is_network(entry)
        || is_name()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_urls_apart() {
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
    fn refuses_urls_it_cannot_follow_and_repeats_none() {
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

    /// The proxy for `https://api.openai.com` under these variables, or the error.
    fn proxy(variables: &[(&str, &str)]) -> Result<Option<String>, String> {
        let target = Target::parse("https://api.openai.com/v1/responses").unwrap();
        let lookup = |name: &str| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, value)| value.into())
        };
        outbound_proxy(&target, lookup).map(|proxy| proxy.map(|proxy| proxy.uri().to_string()))
    }

    #[test]
    fn follows_proxy_variables() {
        let there = Ok(Some("http://p:1/".to_owned()));
        assert_eq!(proxy(&[]), Ok(None));
        assert_eq!(proxy(&[("HTTPS_PROXY", "")]), Ok(None));
        assert_eq!(proxy(&[("HTTPS_PROXY", "http://p:1")]), there);
        assert_eq!(proxy(&[("https_proxy", "p:1")]), there);
        assert_eq!(proxy(&[("ALL_PROXY", "http://p:1/")]), there);
        assert_eq!(
            proxy(&[("HTTPS_PROXY", "http://p:1"), ("ALL_PROXY", "http://q:2")]),
            there
        );
        assert_eq!(proxy(&[("HTTP_PROXY", "http://p:1")]), Ok(None));
        assert_eq!(
            proxy(&[
                ("ALL_PROXY", "http://p:1"),
                ("NO_PROXY", "x.org, openai.com")
            ]),
            Ok(None)
        );
        assert_eq!(
            proxy(&[("ALL_PROXY", "http://p:1"), ("no_proxy", "*")]),
            Ok(None)
        );
        assert_eq!(
            proxy(&[
                ("ALL_PROXY", "http://p:1"),
                ("NO_PROXY", "10.0.0.0/8,::1,.x.org,")
            ]),
            there
        );
    }

    #[test]
    fn values_that_would_be_ignored_are_errors() {
        let cases = [
            ("HTTPS_PROXY", "socks5://secret:1"),
            ("ALL_PROXY", "https://secret:1"),
            ("HTTPS_PROXY", "http://"),
            ("https_proxy", "http://se cret"),
            ("ALL_PROXY", "/secret"),
            ("HTTPS_PROXY", "http://secret:"),
            ("HTTPS_PROXY", "http://secret:port"),
            ("HTTPS_PROXY", "http://user:secret@host:port"),
            ("NO_PROXY", "*.secret"),
            ("no_proxy", "secret:443"),
            ("NO_PROXY", "10.0.0.0/33"),
            ("NO_PROXY", "secret/8"),
        ];
        for (name, value) in cases {
            let error = proxy(&[(name, value)]).expect_err(value);
            assert!(
                error.starts_with(name) && !error.contains("secret"),
                "{name}={value}: {error}"
            );
        }
    }
}
