//! `--server-info`: a file that tells other programs the port.

use std::fs::{self, File, Metadata, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};

/// The file. On drop it is removed, or emptied where it cannot be, if its content is still ours.
pub(crate) struct ServerInfo {
    path: PathBuf,
    /// Until the file is renamed: its name next to `path`.
    temp_path: Option<PathBuf>,
    /// Stays usable if the file's mode or owner changes, or this process's user.
    file: File,
    /// Empty until the file is published.
    content: String,
}

impl ServerInfo {
    /// Creates an empty file next to `path` under an unpredictable name, and parent directories where
    /// they are missing. In a directory that is not writable, a regular file at `path` will do.
    ///
    /// An error is a message with the path and the reason: it exists and is not a regular file, such as
    /// a device, or nothing can be written there. Root must not turn `/dev/null` into a file.
    pub(crate) fn prepare(path: &Path) -> Result<Self, String> {
        create(path).map_err(|error| unwritable(path, &error))
    }

    /// Writes `{"port":…,"pid":…}` and a newline, and renames the file into place: nobody reads half of
    /// it, and a link that was planted there is replaced and not followed.
    ///
    /// If the rename fails (a directory without write permission, a file mounted into a container),
    /// the existing file is written in place.
    pub(crate) fn publish(mut self, port: u16) -> Result<Self, String> {
        let pid = std::process::id();
        self.content = format!("{{\"port\":{port},\"pid\":{pid}}}\n");
        let written = self.write().map_err(|error| unwritable(&self.path, &error));
        written.map(|()| self)
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all(self.content.as_bytes())?;
        let Some(temp_path) = self.temp_path.take() else {
            return Ok(());
        };
        fs::rename(&temp_path, &self.path).or_else(|error| {
            let _ = fs::remove_file(temp_path);
            self.file = open_existing(&self.path).ok_or(error)?;
            self.write()
        })
    }
}

impl Drop for ServerInfo {
    fn drop(&mut self) {
        let _ = self.temp_path.as_ref().map(fs::remove_file);
        // One byte more, to notice what others have appended.
        let mut content = vec![0; self.content.len() + 1];
        let length = self.file.read_at(&mut content, 0).unwrap_or(0);
        let unchanged = content[..length] == *self.content.as_bytes();
        // Whether `path` still names our file.
        let inode = |metadata: Metadata| (metadata.dev(), metadata.ino());
        let named = fs::symlink_metadata(&self.path).map(inode).ok();
        let in_place = named == self.file.metadata().map(inode).ok();
        if unchanged && !(in_place && fs::remove_file(&self.path).is_ok()) {
            let _ = self.file.set_len(0);
        }
    }
}

fn unwritable(path: &Path, error: &io::Error) -> String {
    format!("cannot write --server-info {}: {error}", path.display())
}

fn create(path: &Path) -> io::Result<ServerInfo> {
    let path = std::path::absolute(path)?;
    let parent = path.parent().unwrap_or(&path);
    let nearest = parent.ancestors().find_map(|path| path.canonicalize().ok());
    if nearest.is_some_and(|directory| directory.starts_with("/dev")) {
        return Err(io::Error::other("refusing to write under /dev"));
    }
    let is_other = |existing: Metadata| !existing.is_file() && !existing.is_symlink();
    if path.file_name().is_none() || fs::symlink_metadata(&path).is_ok_and(is_other) {
        return Err(io::Error::other("it does not name a regular file"));
    }
    fs::create_dir_all(parent)?;
    let random = RandomState::new().hash_one(std::process::id());
    let temp_path = path.with_file_name(format!(".codex-responses-api-proxy.{random:016x}"));
    let mut options = OpenOptions::new();
    // Everyone may read the file, less what the umask takes away: it holds no secret.
    options.read(true).write(true).create_new(true).mode(0o644);
    let (temp_path, file) = match options.open(&temp_path) {
        Ok(file) => (Some(temp_path), file),
        Err(error) => (None, open_existing(&path).ok_or(error)?),
    };
    Ok(ServerInfo {
        path,
        temp_path,
        file,
        content: String::new(),
    })
}

/// Opens the file at `path` for writing, unless that would also write a file of another name.
fn open_existing(path: &Path) -> Option<File> {
    let mut options = OpenOptions::new();
    // Not blocked by a pipe that has replaced the file.
    options.custom_flags(O_NOFOLLOW | O_NONBLOCK);
    let file = options.read(true).write(true).open(path).ok()?;
    let metadata = file.metadata().ok()?;
    (metadata.is_file() && metadata.nlink() == 1).then_some(file)
}
