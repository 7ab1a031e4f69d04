//! The file that tells others the port.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Who may read the file: everyone, it holds no secret (less what the umask takes away).
const MODE: u32 = 0o644;

/// The file, removed on drop if it is still as we wrote it.
pub struct ServerInfo {
    path: PathBuf,
    /// Where it is until it is published.
    beside: PathBuf,
    file: File,
    /// What it holds; nothing until it is published.
    content: String,
}

impl ServerInfo {
    /// Makes an empty file beside `path`, whose parents are made, under a name that nobody can guess.
    ///
    /// # Errors
    ///
    /// A sentence with the path and what is wrong: there is something that is no file, such as a
    /// device, or none can be made. Root must not turn `/dev/null` into a file.
    pub fn prepare(path: &Path) -> Result<Self, String> {
        create_beside(path).map_err(|error| unwritable(path, &error))
    }

    /// Writes `{"port":…,"pid":…}` and a newline, and renames the file into place: nobody reads half of
    /// it, and a link that was planted there is replaced and not followed.
    ///
    /// # Errors
    ///
    /// A sentence with the path and the system's reason.
    pub fn publish(&mut self, port: u16) -> Result<(), String> {
        let pid = std::process::id();
        self.content = format!("{{\"port\":{port},\"pid\":{pid}}}\n");
        let written = self.file.write_all(self.content.as_bytes());
        written
            .and_then(|()| fs::rename(&self.beside, &self.path))
            .map_err(|error| unwritable(&self.path, &error))
    }
}

fn unwritable(path: &Path, error: &io::Error) -> String {
    format!("cannot write --server-info {}: {error}", path.display())
}

impl Drop for ServerInfo {
    fn drop(&mut self) {
        // It is there no more once it is published.
        let _ = fs::remove_file(&self.beside);
        let is_file = fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.is_file());
        let is_ours = |content| !self.content.is_empty() && content == self.content.as_bytes();
        let is_there = is_file && fs::read(&self.path).is_ok_and(is_ours);
        if !(is_there && fs::remove_file(&self.path).is_ok()) {
            // Without root, its directory may be closed to us by now. A file that replaced it is not this one.
            let _ = self.file.set_len(0);
        }
    }
}

fn create_beside(path: &Path) -> io::Result<ServerInfo> {
    let path = std::path::absolute(path)?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other("the path does not name a file"));
    };
    let nearest = parent
        .ancestors()
        .find_map(|folder| folder.canonicalize().ok());
    if nearest.is_some_and(|folder| folder.starts_with("/dev")) {
        return Err(io::Error::other("/dev is no place for a file"));
    }
    match fs::symlink_metadata(&path) {
        Ok(there) if !there.is_file() && !there.is_symlink() => {
            return Err(io::Error::other(
                "there is something that is no regular file",
            ));
        }
        _ => fs::create_dir_all(parent)?,
    }
    let random = RandomState::new().hash_one(std::process::id());
    let beside = parent.join(format!(".{}.{random:016x}", name.to_string_lossy()));
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(MODE);
    let file = options.open(&beside)?;
    Ok(ServerInfo {
        path,
        beside,
        file,
        content: String::new(),
    })
}
