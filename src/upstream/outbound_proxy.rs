//! The outbound proxy that environment variables name.

use std::{ffi::OsString, net::IpAddr};

use hyper_util::client::proxy::matcher::{Intercept, Matcher};

use super::target::{Target, usable_port};

/// The CONNECT proxy for `target` in `HTTPS_PROXY`, else `ALL_PROXY`, unless `NO_PROXY` excludes the target, or
/// their lower-case forms; `variable` looks one up. A blank value counts as unset. Entries of `NO_PROXY` that
/// match nothing are logged: many systems set some by default.
///
/// A plain upstream is on loopback and never goes through a proxy, which would see the key. Only the variable
/// that applies can be an error: the key's owner believes that requests go through its proxy.
pub(crate) fn outbound_proxy(
    target: &Target,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<Option<Intercept>, String> {
    let is_set = |value: &OsString| !value.as_encoded_bytes().trim_ascii().is_empty();
    let lookup = |name: &'static str| Some((variable(name).filter(is_set)?, name));
    let names = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let found = names.into_iter().find_map(lookup);
    let Some((value, name)) = found.filter(|_| target.tls_name.is_some()) else {
        return Ok(None);
    };
    let no = ["NO_PROXY", "no_proxy"].into_iter().find_map(lookup);
    let (no, no_name) = no.unwrap_or_default();
    let invalid = |_| format!("{no_name} is not UTF-8: correct or unset it");
    let no = no.into_string().map_err(invalid)?;
    let (no, unusable) = no_proxy_entries(&no, target.origin.port_u16().unwrap_or(443));
    if !unusable.is_empty() {
        log!("{no_name} has entries that match nothing here: {unusable:?}");
    }
    let value = value.to_str().unwrap_or_default().trim();
    // NO_PROXY decides whether an invalid value matters, so another that is rejected stands in for it.
    let matcher = Matcher::builder().https(value).all("socks5://unusable");
    let proxy = matcher.no(no.join(",")).build().intercept(&target.origin);
    proxy.map(|proxy| checked(name, value, proxy)).transpose()
}

/// Accepts a proxy if this program can follow the value of its variable exactly.
fn checked(name: &str, value: &str, proxy: Intercept) -> Result<Intercept, String> {
    let (before_host, _) = value.rsplit_once('@').unwrap_or_default();
    let (_, user_info) = before_host.split_once("://").unwrap_or(("", before_host));
    let authority = proxy.uri().authority();
    let port = authority.and_then(|authority| usable_port(authority, 80));
    let problem = if user_info.contains(['@', '/', '?', '#']) {
        "has a reserved character in the user name or password: percent-encode it, '@' as %40"
    } else if proxy.uri().scheme_str() != Some("http") || port.is_none() {
        "is not the URL of an http:// proxy: use one such as http://proxy.example:3128, or unset it"
    } else {
        return Ok(proxy);
    };
    Err(format!("{name} {problem}"))
}

/// The entries of `NO_PROXY` that apply to `port`, as hyper-util's matcher knows them, and those that match
/// nothing. `*.host` becomes `.host`, and `host:port` becomes `host` if the port is this one.
fn no_proxy_entries(value: &str, port: u16) -> (Vec<&str>, Vec<&str>) {
    let is_in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let is_usable = |host: &str| {
        let (address, prefix) = host.split_once('/').unwrap_or((host, "0"));
        let max_prefix = if address.contains(':') { 128 } else { 32 };
        let is_prefix = prefix.parse().is_ok_and(|bits: u8| bits <= max_prefix);
        let is_network = is_prefix && address.parse::<IpAddr>().is_ok();
        host == "*" || host.bytes().all(is_in_name) || is_network
    };
    let (mut usable, mut unusable) = (Vec::new(), Vec::new());
    for entry in value.split(',').flat_map(str::split_whitespace) {
        let bare = entry.trim_matches(['[', ']']);
        let (host, entry_port) = match bare.rsplit_once(':') {
            Some((host, port)) if !is_usable(bare) => (host.trim_matches(']'), port.parse().ok()),
            _ => (bare, Some(port)),
        };
        let suffix = host.strip_prefix('*').filter(|rest| rest.starts_with('.'));
        let host = suffix.unwrap_or(host);
        match entry_port.filter(|_| is_usable(host)) {
            Some(entry_port) => usable.extend((entry_port == port).then_some(host)),
            None => unusable.push(entry),
        }
    }
    (usable, unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The proxy for `https://api.openai.com` under these variables, or the error.
    fn proxy(variables: &[(&str, &str)]) -> Result<Option<String>, String> {
        let target = Target::parse("https://api.openai.com/v1/responses").unwrap();
        let lookup = |name: &str| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, value)| value.into())
        };
        let found = outbound_proxy(&target, lookup)?;
        Ok(found.map(|proxy| proxy.uri().to_string()))
    }

    #[test]
    fn splits_no_proxy_into_usable_and_unusable_entries() {
        let same = "localhost,*,.x.org,openai.com,::1,10.0.0.1,10.0.0.0/8,fd00::/8";
        let cases = [
            (same, same, ""),
            (
                " a.org ,\tb.org\n,, c.org d.org",
                "a.org,b.org,c.org,d.org",
                "",
            ),
            ("*.local,*.x.org:443", ".local,.x.org", ""),
            ("[::1],[::1]:443,[::2]:80", "::1,::1", ""),
            ("a.org:443,b.org:8080,10.0.0.1:443", "a.org,10.0.0.1", ""),
            ("x*,*x.org,a.org:,a.org:x", "", "x*,*x.org,a.org:,a.org:x"),
            (
                "169.254/16,10.0.0.0/33,x/8",
                "",
                "169.254/16,10.0.0.0/33,x/8",
            ),
        ];
        for (value, usable, unusable) in cases {
            let (found, rest) = no_proxy_entries(value, 443);
            assert_eq!(found.join(","), usable, "{value:?}");
            assert_eq!(rest.join(","), unusable, "{value:?}");
        }
    }

    #[test]
    fn only_the_variable_that_applies_must_be_usable() {
        let http = ("https_proxy", "http://p:1");
        let socks = ("all_proxy", "socks5://secret:1");
        let found = Ok(Some("http://p:1/".to_owned()));
        assert_eq!(proxy(&[http, socks]), found);
        assert_eq!(proxy(&[("HTTPS_PROXY", " http://p:1 \n")]), found);
        assert_eq!(
            proxy(&[("HTTPS_PROXY", " \n"), ("ALL_PROXY", "p:1")]),
            found
        );
        for no_proxy in ["*.openai.com", "api.openai.com:443", "*", "x openai.com"] {
            assert_eq!(
                proxy(&[socks, ("NO_PROXY", no_proxy)]),
                Ok(None),
                "{no_proxy}"
            );
        }
        for no_proxy in ["*.x.org", "api.openai.com:80", "10.0.0.0/33"] {
            assert_eq!(proxy(&[http, ("NO_PROXY", no_proxy)]), found, "{no_proxy}");
            proxy(&[socks, ("NO_PROXY", no_proxy)]).expect_err(no_proxy);
        }
        let target = Target::parse("http://localhost:1/v1/responses").unwrap();
        let found = outbound_proxy(&target, |name| {
            (name == "ALL_PROXY").then(|| socks.1.into())
        });
        assert!(found.is_ok_and(|proxy| proxy.is_none()), "without TLS");
    }

    #[test]
    fn raw_reserved_characters_in_user_info_suggest_percent_encoding() {
        for value in [
            "http://secret@corp.example:pw@p",
            "secret@corp.example@p:1",
            "http://me:sec@ret@p",
            "http://me:12/secret@p",
            "http://me:12?secret@p",
            "http://me:12#secret@p",
        ] {
            let error = proxy(&[("HTTPS_PROXY", value)]).expect_err(value);
            assert!(
                error.contains("%40") && !error.contains("secret"),
                "{value}: {error}"
            );
        }
        let encoded = proxy(&[("HTTPS_PROXY", "http://me%40corp.example:pw@p:1")]);
        assert_eq!(encoded, Ok(Some("http://p:1/".to_owned())));
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
    fn unusable_proxy_values_are_errors() {
        let cases = [
            ("HTTPS_PROXY", "socks5://secret:1"),
            ("ALL_PROXY", "https://secret:1"),
            ("HTTPS_PROXY", "http://"),
            ("https_proxy", "http://se cret"),
            ("ALL_PROXY", "/secret"),
            ("HTTPS_PROXY", "http://secret:"),
            ("HTTPS_PROXY", "http://secret:port"),
            ("HTTPS_PROXY", "http://user:secret@host:port"),
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
