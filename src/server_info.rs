//! The file that tells others the port.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Who may read the file: everyone, it holds no secret (less what the umask takes away).
const MODE: u32 = 0o644;

/// How many names for the temporary file are tried, should others be there already.
const ATTEMPTS: u32 = 16;

/// The file, removed on drop if it is still as we wrote it.
pub struct ServerInfo {
    path: PathBuf,
    content: String,
}

impl ServerInfo {
    /// Writes `{"port":…,"pid":…}` and a newline to `path`, whose parents are made.
    ///
    /// It is written beside and renamed into place: nobody reads half of it, and a link that was
    /// planted there is replaced and not followed.
    ///
    /// # Errors
    ///
    /// A sentence with the path and the system's reason.
    pub fn write(path: &Path, port: u16) -> Result<Self, String> {
        let pid = std::process::id();
        let content = format!("{{\"port\":{port},\"pid\":{pid}}}\n");
        place(path, &content)
            .map_err(|error| format!("cannot write --server-info {}: {error}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            content,
        })
    }
}

impl Drop for ServerInfo {
    fn drop(&mut self) {
        let is_file = fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_file());
        if is_file && fs::read(&self.path).is_ok_and(|content| content == self.content.as_bytes()) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn place(path: &Path, content: &str) -> io::Result<()> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::other("the path does not name a file"))?;
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut attempt = 0;
    let (beside, mut file) = loop {
        let mut beside = std::ffi::OsString::from(".");
        beside.push(name);
        beside.push(format!(".{}.{attempt}", std::process::id()));
        let beside = path.with_file_name(beside);
        match OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(&beside)
        {
            Ok(file) => break (beside, file),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && attempt < ATTEMPTS => {
                attempt += 1
            }
            Err(error) => return Err(error),
        }
    };
    let written = file
        .write_all(content.as_bytes())
        .and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}
