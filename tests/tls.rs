//! TLS to the upstream: versions, key exchange, and the CAs that are trusted.

mod support;

use rustls::crypto::aws_lc_rs::{self, kx_group::X25519MLKEM768};
use rustls::version::{TLS12, TLS13};
use std::fs;
use std::path::Path;
use support::*;

#[test]
fn connects_with_tls_1_2_and_with_hybrid_key_exchange_only() {
    let mut hybrid = aws_lc_rs::default_provider();
    hybrid.kx_groups = vec![X25519MLKEM768];
    for (provider, version) in [(aws_lc_rs::default_provider(), &TLS12), (hybrid, &TLS13)] {
        let upstream = Upstream::with_tls(provider, &[version], &["localhost"], |_| {}, ok);
        let proxy = ProxyCommand::for_upstream(&upstream).start();
        assert_eq!(proxy.post_default().status(), 200, "{version:?}");
    }
}

#[test]
fn company_ca_is_trusted_by_flag_or_variable() {
    let (upstream, other) = (Upstream::start(ok), Upstream::start(ok));
    let (ca, other_ca) = (upstream.ca_file().unwrap(), other.ca_file().unwrap());
    // A bundle may contain certificates that cannot be used.
    let dir = TestDir::new();
    let bundle = dir.join("bundle.pem");
    let unusable = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";
    fs::write(
        &bundle,
        unusable.to_owned() + &fs::read_to_string(&ca).unwrap(),
    )
    .unwrap();
    let command = |codex: &Path, ssl: &Path| {
        let command = ProxyCommand::new().url(&upstream.url());
        command
            .env("CODEX_CA_CERTIFICATE", codex)
            .env("SSL_CERT_FILE", ssl)
    };
    let unset = Path::new("");
    for (name, command, expected) in [
        ("CODEX_CA_CERTIFICATE", command(&ca, unset), 200),
        ("SSL_CERT_FILE", command(unset, &ca), 200),
        ("a bundle", command(unset, &bundle), 200),
        ("both", command(&ca, &other_ca), 200),
        ("another CA first", command(&other_ca, &ca), 502),
        (
            "a flag",
            command(&other_ca, &other_ca).trust(&upstream),
            200,
        ),
        ("neither", command(unset, unset), 502),
    ] {
        let mut proxy = command.start();
        assert_eq!(proxy.post_default().status(), expected, "{name}");
        let line = proxy.wait_for_request("request ", &[]);
        let names = ["--upstream-ca", "CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"];
        for source in names {
            assert_eq!(line.contains(source), name == "neither", "{name}: {line}");
        }
    }
}
