//! The file that tells others the port.

use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};

/// Who may read the file: everyone, it holds no secret (less what the umask takes away).
const MODE: u32 = 0o644;

/// A temporary file next to the final one, removed on drop unless it has been renamed.
struct TempPath(PathBuf);

impl Drop for TempPath {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The file before it is published. At least one of the two ways to write it works.
pub struct Prepared {
    path: PathBuf,
    temp_path: TempPath,
    /// An empty file at `temp_path`, to be renamed.
    temp: io::Result<File>,
    /// The file at `path`, to be written in place where the rename fails.
    existing: io::Result<File>,
}

impl Prepared {
    /// Creates an empty file next to `path` under an unpredictable name, and parent directories where
    /// they are missing. In a directory that is not writable, a regular file at `path` will do.
    ///
    /// # Errors
    ///
    /// A sentence with the path and the reason: it exists and is not a regular file, such as a
    /// device, or nothing can be written there. Root must not turn `/dev/null` into a file.
    pub fn new(path: &Path) -> Result<Self, String> {
        prepare(path).map_err(|error| unwritable(path, &error))
    }

    /// Writes `{"port":…,"pid":…}` and a newline, and renames the file into place: nobody reads half of
    /// it, and a link that was planted there is replaced and not followed.
    ///
    /// Where the rename fails (a directory without write permission, a file mounted into a container), the
    /// existing file is written in place.
    ///
    /// # Errors
    ///
    /// A sentence with the path and the system's reason.
    pub fn publish(self, port: u16) -> Result<ServerInfo, String> {
        let pid = std::process::id();
        let content = format!("{{\"port\":{port},\"pid\":{pid}}}\n");
        let write = |mut file: File| {
            file.set_len(0)?;
            file.write_all(content.as_bytes()).map(|()| file)
        };
        let renamed = self.temp.and_then(write).and_then(|file| {
            fs::rename(&self.temp_path.0, &self.path)?;
            Ok(file)
        });
        let file = renamed
            .or_else(|error| write(self.existing.map_err(|_| error)?))
            .map_err(|error| unwritable(&self.path, &error))?;
        Ok(ServerInfo {
            path: self.path,
            file,
            content,
        })
    }
}

/// The published file. On drop it is removed, or emptied where it cannot be, if it still has our content.
pub struct ServerInfo {
    path: PathBuf,
    /// Stays usable if the file's mode or owner changes, or this process's user.
    file: File,
    content: String,
}

impl Drop for ServerInfo {
    fn drop(&mut self) {
        // One byte more, to notice what others have appended.
        let mut content = vec![0; self.content.len() + 1];
        let length = self.file.read_at(&mut content, 0).unwrap_or(0);
        let unchanged = content[..length] == *self.content.as_bytes();
        // Whether `path` still names our file.
        let inode = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let in_place = fs::symlink_metadata(&self.path).map(inode).ok()
            == self.file.metadata().map(inode).ok();
        if unchanged && !(in_place && fs::remove_file(&self.path).is_ok()) {
            let _ = self.file.set_len(0);
        }
    }
}

fn unwritable(path: &Path, error: &io::Error) -> String {
    format!("cannot write --server-info {}: {error}", path.display())
}

fn prepare(path: &Path) -> io::Result<Prepared> {
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
    let temp_path = parent.join(format!(".{}.{random:016x}", name.to_string_lossy()));
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let existing = open_existing(options.clone(), &path);
    let temp = options.create_new(true).mode(MODE).open(&temp_path);
    match (temp, &existing) {
        (Err(error), Err(_)) => Err(error),
        (temp, _) => Ok(Prepared {
            temp_path: TempPath(temp_path),
            path,
            temp,
            existing,
        }),
    }
}

/// Opens the file at `path` for writing, unless that would also write a file of another name.
fn open_existing(mut options: OpenOptions, path: &Path) -> io::Result<File> {
    // Not blocked by a pipe that has replaced the file.
    let file = options.custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    match metadata.is_file() && metadata.nlink() == 1 {
        true => Ok(file),
        false => Err(io::ErrorKind::InvalidInput.into()),
    }
}
