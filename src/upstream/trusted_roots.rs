//! The certificate authorities that the upstream's certificate may come from.

use std::{ffi::OsString, fmt::Display, path::Path};

use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, pem::PemObject};

/// Mozilla's roots and the usable certificates in a PEM file: `flag`'s, else that in `CODEX_CA_CERTIFICATE`, which
/// Codex reads, else that in `SSL_CERT_FILE`. `variable` looks one up; an empty value counts as unset.
pub(crate) fn trusted_roots(
    flag: Option<&Path>,
    variable: impl Fn(&str) -> Option<OsString>,
) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    let variables = ["CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"].map(|name| (name, variable(name)));
    let sources = [("--upstream-ca", flag.map(OsString::from))];
    for (source, path) in sources.into_iter().chain(variables) {
        let Some(path) = path.filter(|path| !path.is_empty()) else {
            continue;
        };
        let advice = "name a file with one or more PEM certificates";
        let unusable = |why: &dyn Display| format!("{source} {}: {why}; {advice}", path.display());
        let certificates = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect);
        let certificates: Vec<_> = certificates.map_err(|error| unusable(&error))?;
        return match roots.add_parsable_certificates(certificates) {
            (0, _) => Err(unusable(&"no usable certificate found")),
            _ => Ok(roots),
        };
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_comes_from_the_first_source_that_is_set() {
        const NAMES: [&str; 3] = ["--upstream-ca", "CODEX_CA_CERTIFICATE", "SSL_CERT_FILE"];
        for (values, expected) in [
            ([Some("/dev/null/a"), Some("b"), Some("c")], Some(0)),
            ([None, Some("/dev/null/b"), Some("c")], Some(1)),
            ([None, Some(""), Some("/dev/null/c")], Some(2)),
            ([None, None, Some("/dev/null/c")], Some(2)),
            ([None, Some(""), Some("")], None),
            ([None; 3], None),
        ] {
            let variable = |name: &str| {
                let index = NAMES.iter().position(|other| *other == name)?;
                values[index].map(OsString::from)
            };
            // The error names the source and the file: there is none of these names.
            let error = trusted_roots(values[0].map(Path::new), variable).err();
            let named = expected.map(|index: usize| (NAMES[index], values[index].unwrap()));
            let expected = named.map(|(name, value)| format!("{name} {value}: "));
            match (error, expected) {
                (None, None) => {}
                (Some(error), Some(start)) => assert!(error.starts_with(&start), "{error}"),
                (error, expected) => panic!("{values:?}: {error:?}, not {expected:?}"),
            }
        }
    }
}
