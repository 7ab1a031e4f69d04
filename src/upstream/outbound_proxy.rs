//! The proxy on the way to the upstream, as environment variables name it.

use std::ffi::OsString;
use std::net::IpAddr;

use hyper::Uri;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};

use super::target::{Target, usable_port};
use crate::log;

/// Finds the CONNECT proxy for `target` in `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` or their
/// lower-case forms; `variable` looks one up. Entries of `NO_PROXY` that can't be used are named in the
/// log and no more: many systems set such by default.
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
        let names = [upper.to_owned(), upper.to_ascii_lowercase()];
        let mut values = names
            .into_iter()
            .filter_map(|name| Some((variable(&name)?, name)));
        let found = values.find(|(value, _)| !value.is_empty());
        let (value, name) = found.unwrap_or_default();
        match value.into_string() {
            Ok(value) => Ok((name, value)),
            Err(_) => Err(format!("{name} is not UTF-8: correct or unset it")),
        }
    };
    let https = lookup("HTTPS_PROXY")?;
    let all = lookup("ALL_PROXY")?;
    for (name, value) in [&https, &all] {
        check_proxy(name, value)?;
    }
    if target.tls_name.is_none() || https.1.is_empty() && all.1.is_empty() {
        return Ok(None);
    }
    let (no_name, no) = lookup("NO_PROXY")?;
    let unusable = unusable_entries(&no);
    if !unusable.is_empty() {
        log::line(format_args!(
            "{no_name} has entries that match nothing here: {unusable:?}"
        ));
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
    let uri = value.parse::<Uri>();
    let is_http = |uri: &Uri| uri.scheme_str().is_none_or(|scheme| scheme == "http");
    let has_host = |uri: &Uri| {
        uri.authority()
            .and_then(|authority| usable_port(authority, 80))
            .is_some()
    };
    match uri {
        _ if value.is_empty() => Ok(()),
        Ok(uri) if is_http(&uri) && has_host(&uri) => Ok(()),
        _ => Err(format!(
            "{name} is not the URL of an http:// proxy: use one such as http://proxy.example:3128, or unset it"
        )),
    }
}

/// The entries to which hyper-util's matcher doesn't give the meaning that their author had in mind.
fn unusable_entries(no_proxy: &str) -> Vec<&str> {
    let is_address = |text: &str| text.parse::<IpAddr>().is_ok();
    let is_network = |(address, prefix): (&str, &str)| {
        let bits = if address.contains(':') { 128 } else { 32 };
        is_address(address) && prefix.parse::<u8>().is_ok_and(|prefix| prefix <= bits)
    };
    let is_in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    let is_unusable = |entry: &&str| {
        *entry != "*"
            && !entry.bytes().all(is_in_name)
            && !is_address(entry)
            && !entry.split_once('/').is_some_and(is_network)
    };
    no_proxy
        .split(',')
        .map(str::trim)
        .filter(is_unusable)
        .collect()
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
    fn no_proxy_entries_that_match_nothing_are_told_from_others() {
        let usable = "localhost, *, .x.org,openai.com,::1,10.0.0.1,10.0.0.0/8,fd00::/8,";
        assert_eq!(unusable_entries(usable), [""; 0]);
        let unusable = "*.local, 169.254/16, [::1], localhost:8080, 10.0.0.0/33, x/8";
        let entries: Vec<_> = unusable.split(", ").collect();
        assert_eq!(unusable_entries(unusable), entries);
        // Whatever it says, it is no error.
        let variables = [("ALL_PROXY", "http://p:1"), ("NO_PROXY", unusable)];
        assert_eq!(proxy(&variables), Ok(Some("http://p:1/".to_owned())));
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
