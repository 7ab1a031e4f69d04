//! `--dump-dir`: requests and responses written to files, for debugging.
//!
//! A body is kept in memory and written once, at its end, off the event loop, so that a slow disk delays no
//! stream.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{cell::Cell, mem::take, sync::Arc};

use hyper::header::{AUTHORIZATION, HeaderMap};
use serde_json::{Value, json, value::RawValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::{task::spawn_blocking, time::timeout};

/// The most of a body that is dumped, in bytes. A longer body is truncated, and its file says so.
const MAX_BODY: usize = 16 << 20;

/// The size of all dumps together that wait for their end or for the disk, in bytes. One that would
/// exceed it is skipped.
const BUDGET: u32 = 64 << 20;

/// The size of a dump without its body, in bytes, roughly.
const OVERHEAD: usize = 4 << 10;

/// How long the end of the program waits for the disk.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// Stands for the value of `Authorization`: clients may send credentials of their own.
const REDACTED: &str = "[REDACTED]";

/// Writes dumps to a directory.
pub(crate) struct Dumper {
    directory: PathBuf,
    next: Cell<u64>,
    /// A permit for each byte of [`BUDGET`].
    budget: Arc<Semaphore>,
}

impl Dumper {
    /// Creates the directory, accessible to its owner alone.
    pub(crate) fn new(directory: &Path) -> Result<Self, String> {
        let unusable = |error: io::Error| format!("--dump-dir {}: {error}", directory.display());
        let mut builder = DirBuilder::new();
        let created = builder.recursive(true).mode(0o700).create(directory);
        let created = created.and_then(|()| fs::metadata(directory));
        let metadata = created.map_err(unusable)?;
        let is_ours = metadata.uid() == nix::unistd::geteuid().as_raw();
        if metadata.permissions().mode() & 0o077 != 0 || !is_ours {
            return Err(unusable(io::Error::other(
                "other users can access or own this directory, and dumps contain prompts: use a new one, or one of your own with mode 700",
            )));
        }
        Ok(Self {
            directory: directory.to_owned(),
            next: Cell::new(1),
            budget: Arc::new(Semaphore::new(BUDGET as usize)),
        })
    }

    /// The beginning of the names of a request's two files.
    pub(super) fn next_name(&self) -> String {
        let number = self.next.replace(self.next.get() + 1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        format!("{number:06}-{}", now.map_or(0, |now| now.as_millis()))
    }

    /// Waits until all dumps are written, at most 10 s.
    pub(crate) async fn finish(&self) {
        let _ = timeout(FINISH_TIMEOUT, self.budget.acquire_many(BUDGET)).await;
    }

    /// Begins a file with this name. `head` is what it says of the message in addition to the headers.
    pub(super) fn begin(&self, name: &str, mut head: Value, headers: &HeaderMap) -> Tap {
        let header = |(name, value): (&_, &hyper::header::HeaderValue)| {
            let value = match name {
                &AUTHORIZATION => REDACTED.into(),
                _ => String::from_utf8_lossy(value.as_bytes()),
            };
            json!({ "name": name.as_str(), "value": value })
        };
        // A list, since a name may occur more than once.
        head["headers"] = headers.iter().map(header).collect();
        let mut tap = Tap {
            path: self.directory.join(name),
            head,
            body: Vec::new(),
            reserved: Arc::clone(&self.budget).try_acquire_many_owned(0).ok(),
        };
        tap.reserve(OVERHEAD);
        tap
    }
}

/// Copies a body in transit. Dropping it writes the file.
pub(super) struct Tap {
    path: PathBuf,
    head: Value,
    body: Vec<u8>,
    /// Its part of the budget; `None` once that did not suffice.
    reserved: Option<OwnedSemaphorePermit>,
}

impl Tap {
    /// Copies the next part of the body.
    pub(super) fn data(&mut self, data: &[u8]) {
        let copied = data.len().min(MAX_BODY - self.body.len());
        if copied < data.len() {
            self.head["truncated"] = true.into();
        }
        self.reserve(copied);
        if self.reserved.is_some() {
            self.body.extend_from_slice(&data[..copied]);
        }
    }

    /// Reserves as many more bytes, or gives up the dump.
    fn reserve(&mut self, bytes: usize) {
        let Some(reserved) = &mut self.reserved else {
            return;
        };
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        match Arc::clone(reserved.semaphore()).try_acquire_many_owned(bytes) {
            Ok(more) => reserved.merge(more),
            Err(_) => {
                self.reserved = None;
                self.body = Vec::new();
                let path = self.path.display();
                log!("{path} is not written: dump buffer full (64 MiB)");
            }
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let Some(reserved) = self.reserved.take() else {
            return;
        };
        let (path, head, body) = (take(&mut self.path), self.head.take(), take(&mut self.body));
        spawn_blocking(move || {
            if let Err(error) = write(&path, &to_json(&head, &body)) {
                log!("cannot write {}: {error}", path.display());
            }
            drop(reserved);
        });
    }
}

/// A file's text. A JSON body is included unchanged, any other as a JSON string in which invalid UTF-8
/// becomes U+FFFD.
fn to_json(head: &Value, body: &[u8]) -> String {
    let mut text = format!("{head:#}");
    text.truncate(text.trim_end_matches("\n}").len());
    let body = String::from_utf8_lossy(body);
    match serde_json::from_str::<&RawValue>(&body) {
        Ok(_) => text + &format!(",\n  \"body\": {body}\n}}\n"),
        Err(_) => text + &format!(",\n  \"body\": {}\n}}\n", json!(body)),
    }
}

/// Writes a new file, readable by its owner alone, or leaves none.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = file.write_all(text.as_bytes());
    written.inspect_err(|_| drop(fs::remove_file(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_bodies_are_included_unchanged_and_others_as_strings() {
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
            let text = to_json(&json!({ "a": 1 }), body);
            let expected = format!("{{\n  \"a\": 1,\n  \"body\": {expected}\n}}\n");
            assert_eq!(text, expected);
        }
    }
}
