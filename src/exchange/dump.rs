//! `--dump-dir`: requests and responses written to files, for debugging.
//!
//! A body is kept in memory and written once, at its end, off the event loop, so that a slow disk delays no
//! stream.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{cell::Cell, sync::Arc};

use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json, value::RawValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::{task::spawn_blocking, time::timeout};

/// The most of a body that is dumped, in bytes. A longer body is truncated, and its file says so.
const MAX_BODY: usize = 16 << 20;

/// The size of all dumps together that wait for their end or for the disk, in bytes. One that would
/// exceed it is skipped.
const BUDGET: u32 = 64 << 20;

/// The size of a dump without its body, in bytes, roughly.
const OVERHEAD: u32 = 4 << 10;

/// How long the end of the program waits for the disk.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);

/// Writes dumps to a directory.
pub(crate) struct Dumper {
    directory: PathBuf,
    next: Cell<u64>,
    /// A permit for each byte of [`BUDGET`].
    budget: Arc<Semaphore>,
}

impl Dumper {
    /// Creates the directory, accessible to its owner alone.
    pub(crate) fn new(path: &Path) -> Result<Self, String> {
        let unusable = |error: io::Error| format!("--dump-dir {}: {error}", path.display());
        let mut builder = DirBuilder::new();
        let created = builder.recursive(true).mode(0o700).create(path);
        let metadata = created
            .and_then(|()| fs::metadata(path))
            .map_err(unusable)?;
        let is_ours = metadata.uid() == nix::unistd::geteuid().as_raw();
        if metadata.mode() & 0o077 != 0 || !is_ours {
            let message = "other users can access or own this directory, and dumps contain prompts: use a new one, or one of your own with mode 700";
            return Err(unusable(io::Error::other(message)));
        }
        Ok(Self {
            directory: path.to_owned(),
            next: Cell::new(1),
            budget: Arc::new(Semaphore::new(BUDGET as usize)),
        })
    }

    /// Waits until all dumps are written, at most 10 s.
    pub(crate) async fn finish(&self) {
        let _ = timeout(FINISH_TIMEOUT, self.budget.acquire_many(BUDGET)).await;
    }

    /// Names the two files of the next exchange. The returned function begins one, for the named message, with
    /// a [`Value`] in addition to the headers. `None` if the budget does not suffice.
    pub(super) fn next_exchange(&self) -> impl Fn(&str, Value, &HeaderMap) -> Option<Dump> {
        let number = self.next.replace(self.next.get() + 1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let name = format!("{number:06}-{}", now.map_or(0, |now| now.as_millis()));
        let header = |(name, value): (&HeaderName, &HeaderValue)| {
            let value = match *name {
                // Clients may send credentials of their own.
                AUTHORIZATION => "[REDACTED]".into(),
                _ => String::from_utf8_lossy(value.as_bytes()),
            };
            json!({ "name": name.as_str(), "value": value })
        };
        move |message, mut head, headers| {
            // A list, since a name may occur more than once.
            head["headers"] = headers.iter().map(header).collect();
            let path = self.directory.join(format!("{name}-{message}.json"));
            Some(Dump {
                reserved: reserve(&self.budget, OVERHEAD, &path)?,
                path,
                head,
                body: Vec::new(),
            })
        }
    }
}

/// The content of a file that is not written yet.
pub(super) struct Dump {
    path: PathBuf,
    head: Value,
    body: Vec<u8>,
    /// Its part of the budget.
    reserved: OwnedSemaphorePermit,
}

/// Copies a body in transit. Dropping it writes the file. Without a dump, it does nothing.
pub(super) struct Tap(pub(super) Option<Dump>);

impl Tap {
    /// Copies the next part of the body, or gives up the dump.
    pub(super) fn data(&mut self, data: &[u8]) {
        let Some(dump) = &mut self.0 else { return };
        let copied = data.len().min(MAX_BODY - dump.body.len());
        if copied < data.len() {
            dump.head["truncated"] = true.into();
        }
        match reserve(dump.reserved.semaphore(), copied as u32, &dump.path) {
            Some(more) => {
                dump.reserved.merge(more);
                dump.body.extend_from_slice(&data[..copied]);
            }
            None => self.0 = None,
        }
    }
}

/// Reserves as many bytes of the budget for the dump with this path, or logs that it is given up.
fn reserve(budget: &Arc<Semaphore>, bytes: u32, path: &Path) -> Option<OwnedSemaphorePermit> {
    let reserved = Arc::clone(budget).try_acquire_many_owned(bytes).ok();
    if reserved.is_none() {
        let path = path.display();
        log!("{path} is not written: dump buffer full (64 MiB)");
    }
    reserved
}

impl Drop for Tap {
    fn drop(&mut self) {
        let Some(dump) = self.0.take() else { return };
        spawn_blocking(move || {
            if let Err(error) = write(&dump.path, &to_json(&dump.head, &dump.body)) {
                log!("cannot write {}: {error}", dump.path.display());
            }
            // Only now is its part of the budget free: `finish` waits for that.
            drop(dump);
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
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    let written = options.open(path)?.write_all(text.as_bytes());
    written.inspect_err(|_| drop(fs::remove_file(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn finish_waits_until_dumps_are_written() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("dumps");
        let dumper = Dumper::new(&directory).unwrap();
        let begin = dumper.next_exchange();
        let taps = ["request", "response"].map(|message| {
            let mut tap = Tap(begin(message, json!({}), &HeaderMap::new()));
            tap.data(&[b'x'; MAX_BODY]);
            tap
        });
        drop(taps);
        dumper.finish().await;
        let files = fs::read_dir(directory).unwrap();
        let sizes = files.map(|file| file.unwrap().metadata().unwrap().len());
        let whole = sizes.filter(|&size| size > MAX_BODY as u64);
        assert_eq!(whole.count(), 2);
    }

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
