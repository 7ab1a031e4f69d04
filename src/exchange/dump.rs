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
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::log;

/// How much of a body is kept, in bytes. A longer one is cut off there, and its file says so.
const MAX_BODY: usize = 16 << 20;

/// How much of all bodies together may wait for their end or for the disk, in bytes. An exchange that
/// would need more isn't dumped.
const MAX_WAITING: u32 = 64 << 20;

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
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(unusable)?;
        let metadata = fs::metadata(folder).map_err(unusable)?;
        let is_ours = metadata.uid() == nix::unistd::geteuid().as_raw();
        if metadata.permissions().mode() & 0o077 != 0 || !is_ours {
            return Err(format!(
                "--dump-dir {}: others can look into this folder or own it, and dumps hold prompts: use a new one, or one of your own with mode 700",
                folder.display()
            ));
        }
        Ok(Self {
            folder: folder.to_owned(),
            next: Cell::new(1),
            room: Arc::new(Semaphore::new(MAX_WAITING as usize)),
        })
    }

    /// A new exchange.
    pub(super) fn exchange(&self) -> Exchange {
        let number = self.next.replace(self.next.get() + 1);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let milliseconds = now.map_or(0, |now| now.as_millis());
        Exchange {
            prefix: self.folder.join(format!("{number:06}-{milliseconds}")),
            room: Arc::clone(&self.room),
        }
    }

    /// Waits until all is written that will be.
    pub async fn finish(&self) {
        let _ = self.room.acquire_many(MAX_WAITING).await;
    }
}

/// The two files of one exchange.
pub(super) struct Exchange {
    prefix: PathBuf,
    room: Arc<Semaphore>,
}

impl Exchange {
    /// Begins the dump of the request.
    pub(super) fn request(&self, method: &str, url: &str, headers: &HeaderMap) -> Tap {
        let head = [("method", json!(method)), ("url", json!(url))];
        self.begin("request", &head, headers)
    }

    /// Begins the dump of the answer.
    pub(super) fn response(&self, status: u16, headers: &HeaderMap) -> Tap {
        self.begin("response", &[("status", json!(status))], headers)
    }

    fn begin(&self, kind: &str, head: &[(&str, Value)], headers: &HeaderMap) -> Tap {
        let mut path = self.prefix.clone().into_os_string();
        path.push(format!("-{kind}.json"));
        // Headers are a list, since a name may come more than once.
        let entry = |(name, value): (&HeaderName, &HeaderValue)| match name {
            &AUTHORIZATION => json!({ "name": name.as_str(), "value": REDACTED }),
            _ => {
                json!({ "name": name.as_str(), "value": String::from_utf8_lossy(value.as_bytes()) })
            }
        };
        let headers = ("headers", headers.iter().map(entry).collect());
        let mut text = String::from("{\n");
        for (name, value) in head.iter().chain([&headers]) {
            text.push_str(&format!("  \"{name}\": {value},\n"));
        }
        let mut tap = Tap {
            path: path.into(),
            head: text,
            body: Vec::new(),
            is_truncated: false,
            room: Arc::clone(&self.room),
            held: None,
        };
        tap.hold(tap.head.len());
        tap
    }
}

/// Takes a copy of a body on its way. Dropping it writes the file.
pub(super) struct Tap {
    path: PathBuf,
    /// The file's text up to its body.
    head: String,
    body: Vec<u8>,
    is_truncated: bool,
    room: Arc<Semaphore>,
    /// The room that head and body take; `None` if there wasn't enough.
    held: Option<OwnedSemaphorePermit>,
}

impl Tap {
    /// The body goes on with this.
    pub(super) fn data(&mut self, data: &[u8]) {
        let kept = data.len().min(MAX_BODY - self.body.len());
        self.is_truncated |= kept < data.len();
        if self.held.is_some() && self.hold(kept) {
            self.body.extend_from_slice(&data[..kept]);
        }
    }

    /// Takes room for so many more bytes; without it, lets go of all.
    fn hold(&mut self, bytes: usize) -> bool {
        let more = u32::try_from(bytes).unwrap_or(u32::MAX);
        match (
            Arc::clone(&self.room).try_acquire_many_owned(more),
            &mut self.held,
        ) {
            (Ok(more), Some(held)) => held.merge(more),
            (Ok(more), none) => *none = Some(more),
            (Err(_), held) => {
                *held = None;
                self.body = Vec::new();
                let path = self.path.display();
                log::line(format_args!(
                    "{path} is not written: too much is waiting to be"
                ));
            }
        }
        self.held.is_some()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        let path = std::mem::take(&mut self.path);
        let head = std::mem::take(&mut self.head);
        let body = std::mem::take(&mut self.body);
        let truncated = if self.is_truncated {
            "  \"truncated\": true,\n"
        } else {
            ""
        };
        tokio::task::spawn_blocking(move || {
            let text = format!("{head}{truncated}  \"body\": {}\n}}\n", as_json(&body));
            if let Err(error) = write(&path, &text) {
                log::line(format_args!("cannot write {}: {error}", path.display()));
            }
            drop(held);
        });
    }
}

/// A body as it came where it is JSON, else as a JSON string; what is not UTF-8 becomes U+FFFD.
fn as_json(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    match serde_json::from_str::<&RawValue>(&text) {
        Ok(_) => text.into_owned(),
        Err(_) => json!(text).to_string(),
    }
}

/// Writes a new file for its owner alone, or none.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes()).inspect_err(|_| {
        let _ = fs::remove_file(path);
    })
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
            assert_eq!(as_json(body), expected);
        }
    }
}
