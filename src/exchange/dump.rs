//! Exchanges written to files, for debugging: `--dump-dir`.
//!
//! A body is kept in memory and written once, at its end, off the event loop, so that a slow disk holds
//! no stream back.

use std::cell::Cell;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::header::{AUTHORIZATION, HeaderMap};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::log;

/// How much of a body is kept, in bytes. A longer one is cut off there, and its file says so.
const MAX_BODY: usize = 16 << 20;

/// How much of all bodies together may wait for their end or for the disk, in bytes. An exchange that
/// would need more isn't dumped.
const MAX_WAITING: u32 = 64 << 20;

/// What a dump takes beside its body, in bytes, roughly.
const OVERHEAD: usize = 4 << 10;

/// How long the end waits for the disk.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// What the value of `Authorization` is in a dump: not even the client's own is anyone's to read.
const REDACTED: &str = "[REDACTED]";

/// Writes exchanges to a folder.
pub struct Dumper {
    folder: PathBuf,
    next: Cell<u64>,
    /// A permit for each byte that may wait.
    room: Arc<Semaphore>,
}

impl Dumper {
    /// Makes the folder, for its owner alone.
    ///
    /// # Errors
    ///
    /// A sentence: the folder can't be made or written to, or others can look into it.
    pub fn new(folder: &Path) -> Result<Self, String> {
        let unusable = |error: io::Error| format!("--dump-dir {}: {error}", folder.display());
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        let metadata = made.and_then(|()| fs::metadata(folder)).map_err(unusable)?;
        let is_ours = metadata.uid() == nix::unistd::geteuid().as_raw();
        if metadata.permissions().mode() & 0o077 != 0 || !is_ours {
            return Err(unusable(io::Error::other(
                "others can look into this folder or own it, and dumps hold prompts: use a new one, or one of your own with mode 700",
            )));
        }
        Ok(Self {
            folder: folder.to_owned(),
            next: Cell::new(1),
            room: Arc::new(Semaphore::new(MAX_WAITING as usize)),
        })
    }

    /// What the names of a new exchange's files begin with.
    pub(super) fn next_name(&self) -> String {
        let number = self.next.replace(self.next.get() + 1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        format!("{number:06}-{}", now.map_or(0, |now| now.as_millis()))
    }

    /// Waits until all is written that will be; a disk that takes longer than 10 s loses it.
    pub async fn finish(&self) {
        let _ = timeout(FINISH_TIMEOUT, self.room.acquire_many(MAX_WAITING)).await;
    }

    /// Begins a file with this name, for a message of whose head this is known beside its headers.
    pub(super) fn begin(&self, name: &str, mut head: Value, headers: &HeaderMap) -> Tap {
        // A list, since a name may come more than once.
        head["headers"] = headers
            .iter()
            .map(|(name, value)| {
                let value = match name {
                    &AUTHORIZATION => REDACTED.into(),
                    _ => String::from_utf8_lossy(value.as_bytes()),
                };
                json!({ "name": name.as_str(), "value": value })
            })
            .collect();
        let mut tap = Tap {
            path: self.folder.join(name),
            head,
            body: Vec::new(),
            room: Arc::clone(&self.room),
            held: Arc::clone(&self.room).try_acquire_owned().ok(),
        };
        tap.hold(OVERHEAD);
        tap
    }
}

/// Takes a copy of a body on its way. Dropping it writes the file.
pub(super) struct Tap {
    path: PathBuf,
    head: Value,
    body: Vec<u8>,
    room: Arc<Semaphore>,
    /// The room that the body takes; `None` if there wasn't enough.
    held: Option<OwnedSemaphorePermit>,
}

impl Tap {
    /// The body goes on with this.
    pub(super) fn data(&mut self, data: &[u8]) {
        let kept = data.len().min(MAX_BODY - self.body.len());
        if kept < data.len() {
            self.head["truncated"] = true.into();
        }
        if self.held.is_some() && self.hold(kept) {
            self.body.extend_from_slice(&data[..kept]);
        }
    }

    /// Takes room for so many more bytes; without it, lets go of all.
    fn hold(&mut self, bytes: usize) -> bool {
        let more = u32::try_from(bytes).unwrap_or(u32::MAX);
        let more = Arc::clone(&self.room).try_acquire_many_owned(more);
        if let (Ok(more), Some(held)) = (more, &mut self.held) {
            held.merge(more);
            return true;
        }
        self.held = None;
        self.body = Vec::new();
        let path = self.path.display();
        log::line(format_args!("{path} is not written: too much is waiting"));
        false
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        let (path, head) = (std::mem::take(&mut self.path), self.head.take());
        let body = std::mem::take(&mut self.body);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = write(&path, &as_text(&head, &body)) {
                log::line(format_args!("cannot write {}: {error}", path.display()));
            }
            drop(held);
        });
    }
}

/// A file's text. The body is in there as it came where it is JSON, else as a JSON string; what is not
/// UTF-8 becomes U+FFFD.
fn as_text(head: &Value, body: &[u8]) -> String {
    let mut text = format!("{head:#}");
    text.truncate(text.trim_end_matches("\n}").len());
    let body = String::from_utf8_lossy(body);
    match serde_json::from_str::<&RawValue>(&body) {
        Ok(_) => text + &format!(",\n  \"body\": {body}\n}}\n"),
        Err(_) => text + &format!(",\n  \"body\": {}\n}}\n", json!(body)),
    }
}

/// Writes a new file for its owner alone, or none.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path)?;
    let written = file.write_all(text.as_bytes());
    written.inspect_err(|_| drop(fs::remove_file(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_json_where_it_is_that_and_text_where_it_is_not() {
        let cases: [(&[u8], &str); 6] = [
            (b"", r#""""#),
            (
                br#"{"b": 1.0, "a": 12345678901234567890123}"#,
                r#"{"b": 1.0, "a": 12345678901234567890123}"#,
            ),
            (b"data: \"x\"\n\n\x01", r#""data: \"x\"\n\n\u0001""#),
            ("größer \u{1F600}!".as_bytes(), "\"größer \u{1F600}!\""),
            (b"a\xffb\xe2\x82", "\"a\u{fffd}b\u{fffd}\""),
            (b"\"a\xffb\"", "\"a\u{fffd}b\""),
        ];
        for (body, expected) in cases {
            let text = as_text(&json!({ "a": 1 }), body);
            let expected = format!("{{\n  \"a\": 1,\n  \"body\": {expected}\n}}\n");
            assert_eq!(text, expected);
        }
    }
}
