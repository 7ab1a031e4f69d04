//! The stand-in upstream as the benchmark holds it: a process of its own, and its certificate.

use std::error::Error;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::wire::HOST;

/// The running upstream. Dropped, it ends: it watches its stdin.
pub(crate) struct Upstream {
    child: Child,
    pub(crate) port: u16,
    /// The certificate that signs its own.
    pub(crate) ca: PathBuf,
}

impl Upstream {
    /// Lets every [`Task::Step`] stream send one event.
    pub(crate) fn step(&mut self) -> std::io::Result<()> {
        let steps = self.child.stdin.as_mut();
        steps.map_or(Ok(()), |stdin| stdin.write_all(b"."))
    }

    /// Starts it with a certificate of this run.
    pub(crate) fn start(folder: &Path) -> Result<Self, Box<dyn Error>> {
        let ca = folder.join("ca.pem");
        certify(folder, &ca)?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("upstream")
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut port = [0; 2];
        let mut output = child.stdout.take().ok_or("the upstream has no stdout")?;
        output.read_exact(&mut port)?;
        Ok(Self {
            child,
            port: u16::from_be_bytes(port),
            ca,
        })
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes a CA and a certificate for [`HOST`].
fn certify(folder: &Path, ca: &Path) -> Result<(), Box<dyn Error>> {
    let ca_key = rcgen::KeyPair::generate()?;
    let mut ca_params = rcgen::CertificateParams::new(Vec::new())?;
    ca_params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    std::fs::write(ca, ca_params.self_signed(&ca_key)?.pem())?;
    let issuer = rcgen::Issuer::new(ca_params, ca_key);
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(vec![HOST.to_owned()])?;
    // OpenSSL takes a certificate whose issuer has its own name for one that signs itself.
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, HOST);
    let certificate = params.signed_by(&key, &issuer)?;
    std::fs::write(folder.join("upstream.pem"), certificate.pem())?;
    std::fs::write(folder.join("upstream.key"), key.serialize_pem())?;
    Ok(())
}
