//! Exchanges written to files, for debugging: `--dump-dir`.
//!
//! A thread of its own does the writing, so that a slow disk holds no stream back. What it can't keep
//! up with is left out, and the log says so. A body goes to a spool file as it passes; when it has
//! ended, the spool becomes the final file's `body`: as JSON where it is that, else as a string.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use hyper::header::{AUTHORIZATION, HeaderMap};
use serde_core::de::IgnoredAny;
use serde_json::{Value, json};

use crate::log;

/// What a piece of a body takes in memory beside its bytes.
const MESSAGE_OVERHEAD: usize = 128;

/// How many bytes of bodies may wait for the disk. What comes on top is left out of the dump.
const MAX_WAITING: usize = 8 << 20;

/// How much of a body is in memory while its final file is written, in bytes.
const COPY_BUFFER: usize = 64 << 10;

/// What the value of `Authorization` is in a dump: not even the client's own is anyone's to read.
const REDACTED: &str = "[REDACTED]";

/// What the writing thread is told.
enum Message {
    /// A file begins; the text is its JSON up to the body's value.
    Begin {
        id: u64,
        path: PathBuf,
        prologue: Vec<u8>,
    },
    /// Its body goes on.
    Data { id: u64, data: Vec<u8> },
    /// Its body has ended.
    End { id: u64 },
    /// The program ends: what is open is finished as it is.
    Stop,
}

/// What the program's thread and the writing thread share.
struct Queue {
    sender: Sender<Message>,
    waiting: Arc<AtomicUsize>,
}

/// Writes exchanges to a folder.
pub struct Dumper {
    folder: PathBuf,
    next_exchange: Cell<u64>,
    queue: Arc<Queue>,
    writer: Option<JoinHandle<()>>,
}

impl Dumper {
    /// Makes the folder, for its owner alone, and starts the writing thread.
    ///
    /// # Errors
    ///
    /// A sentence: the folder can't be made, or others can look into it.
    pub fn new(folder: &Path) -> Result<Self, String> {
        let unusable = |error: io::Error| format!("--dump-dir {}: {error}", folder.display());
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(unusable)?;
        let metadata = fs::metadata(folder).map_err(unusable)?;
        if metadata.permissions().mode() & 0o077 != 0 || metadata.uid() != our_uid() {
            return Err(format!(
                "--dump-dir {}: others can look into this folder or own it, and dumps hold prompts: use a new one, or one of your own with mode 700",
                folder.display()
            ));
        }
        let (sender, receiver) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let queue = Queue {
            sender,
            waiting: Arc::clone(&waiting),
        };
        let writer = std::thread::Builder::new()
            .name("dump".into())
            .spawn(move || write_files(&receiver, &waiting))
            .map_err(unusable)?;
        Ok(Self {
            folder: folder.to_owned(),
            next_exchange: Cell::new(1),
            queue: Arc::new(queue),
            writer: Some(writer),
        })
    }

    /// Begins the dump of an exchange with its request; gives what the request's body is to be told
    /// to, and the exchange itself.
    #[must_use]
    pub fn request(&self, method: &str, url: &str, headers: &HeaderMap) -> (Tap, ExchangeDump) {
        let number = self.next_exchange.get();
        self.next_exchange.set(number + 1);
        let milliseconds = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| time.as_millis());
        let prefix = self.folder.join(format!("{number:06}-{milliseconds}"));
        let exchange = ExchangeDump {
            number,
            prefix,
            queue: Arc::clone(&self.queue),
        };
        let head = [
            ("method", json!(method)),
            ("url", json!(url)),
            ("headers", header_list(headers)),
        ];
        (exchange.begin("request", 0, &head), exchange)
    }
}

impl Drop for Dumper {
    /// Waits until everything is written.
    fn drop(&mut self) {
        let _ = self.queue.sender.send(Message::Stop);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// The user that this process acts as.
#[allow(unsafe_code)]
fn our_uid() -> u32 {
    // SAFETY: geteuid(2) takes nothing, touches no memory and never fails.
    unsafe { libc::geteuid() }
}

/// One exchange whose request is being dumped.
pub struct ExchangeDump {
    number: u64,
    prefix: PathBuf,
    queue: Arc<Queue>,
}

impl ExchangeDump {
    /// Begins the dump of the answer.
    #[must_use]
    pub fn response(self, status: u16, headers: &HeaderMap) -> Tap {
        self.begin(
            "response",
            1,
            &[("status", json!(status)), ("headers", header_list(headers))],
        )
    }

    fn begin(&self, kind: &str, side: u64, head: &[(&str, Value)]) -> Tap {
        let mut path = self.prefix.clone().into_os_string();
        path.push(format!("-{kind}.json"));
        let mut prologue = String::from("{\n");
        for (name, value) in head {
            prologue.push_str(&format!("  \"{name}\": {value},\n"));
        }
        prologue.push_str("  \"body\": ");
        let id = self.number * 2 + side;
        let begin = Message::Begin {
            id,
            path: path.into(),
            prologue: prologue.into_bytes(),
        };
        let _ = self.queue.sender.send(begin);
        Tap {
            id,
            queue: Arc::clone(&self.queue),
            is_open: true,
        }
    }
}

/// Headers as a list, since a name may come more than once.
fn header_list(headers: &HeaderMap) -> Value {
    let entry = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
        let value = if name == AUTHORIZATION {
            REDACTED.into()
        } else {
            String::from_utf8_lossy(value.as_bytes())
        };
        json!({ "name": name.as_str(), "value": value })
    };
    headers.iter().map(entry).collect()
}

/// Takes a copy of a body on its way. Dropping it ends the file.
pub struct Tap {
    id: u64,
    queue: Arc<Queue>,
    is_open: bool,
}

impl Tap {
    /// The body goes on with this.
    pub fn data(&mut self, data: &[u8]) {
        if !self.is_open {
            return;
        }
        let size = data.len() + MESSAGE_OVERHEAD;
        if self.queue.waiting.fetch_add(size, Ordering::Relaxed) + size > MAX_WAITING {
            self.queue.waiting.fetch_sub(size, Ordering::Relaxed);
            self.is_open = false;
            log::line(format_args!("a dump is incomplete: the disk can't keep up"));
            return;
        }
        let _ = self.queue.sender.send(Message::Data {
            id: self.id,
            data: data.to_vec(),
        });
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = self.queue.sender.send(Message::End { id: self.id });
    }
}

/// A file that is being written.
struct Dump {
    path: PathBuf,
    prologue: Vec<u8>,
    spool: File,
}

/// The writing thread.
fn write_files(messages: &Receiver<Message>, waiting: &AtomicUsize) {
    let mut dumps: HashMap<u64, Dump> = HashMap::new();
    for message in messages {
        match message {
            Message::Begin { id, path, prologue } => match create(&spool_path(&path)) {
                Ok(spool) => {
                    _ = dumps.insert(
                        id,
                        Dump {
                            path,
                            prologue,
                            spool,
                        },
                    )
                }
                Err(error) => complain(&path, &error),
            },
            Message::Data { id, data } => {
                waiting.fetch_sub(data.len() + MESSAGE_OVERHEAD, Ordering::Relaxed);
                if let Some(dump) = dumps.get_mut(&id)
                    && let Err(error) = dump.spool.write_all(&data)
                {
                    complain(&dump.path, &error);
                    let _ = fs::remove_file(spool_path(&dump.path));
                    dumps.remove(&id);
                }
            }
            Message::End { id } => dumps.remove(&id).into_iter().for_each(Dump::finish),
            Message::Stop => break,
        }
    }
    dumps.into_values().for_each(Dump::finish);
}

fn complain(path: &Path, error: &io::Error) {
    log::line(format_args!("cannot write {}: {error}", path.display()));
}

/// Where a body waits for its end.
fn spool_path(path: &Path) -> PathBuf {
    path.with_extension("body")
}

/// A new file for its owner alone.
fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

impl Dump {
    /// Writes the final file, and removes whatever is not to stay.
    fn finish(mut self) {
        if let Err(error) = self.assemble() {
            complain(&self.path, &error);
            let _ = fs::remove_file(&self.path);
        }
        let _ = fs::remove_file(spool_path(&self.path));
    }

    fn assemble(&mut self) -> io::Result<()> {
        let mut out = BufWriter::new(create(&self.path)?);
        out.write_all(&self.prologue)?;
        self.spool.rewind()?;
        let is_json = serde_json::from_reader::<_, IgnoredAny>(BufReader::new(&self.spool)).is_ok();
        self.spool.rewind()?;
        if is_json {
            // The look at it above takes any byte in a string.
            copy_text(&mut self.spool, |text| out.write_all(text.as_bytes()))?;
        } else {
            copy_as_string(&mut self.spool, &mut out)?;
        }
        out.write_all(b"\n}\n")?;
        out.flush()
    }
}

/// Copies text as a JSON string.
fn copy_as_string(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    to.write_all(b"\"")?;
    copy_text(from, |text| {
        let text = serde_json::to_string(text).map_err(io::Error::other)?;
        to.write_all(&text.as_bytes()[1..text.len() - 1])
    })?;
    to.write_all(b"\"")
}

/// Copies text, a piece at a time; what is not UTF-8 becomes U+FFFD.
fn copy_text(
    from: &mut impl Read,
    mut write: impl FnMut(&str) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; COPY_BUFFER];
    let mut kept = 0;
    loop {
        let count = from.read(&mut buffer[kept..])?;
        let piece = &buffer[..kept + count];
        // A character that is split at the end waits for its rest; at most three bytes do.
        let whole = if count > 0 {
            piece.len() - split_tail(piece)
        } else {
            piece.len()
        };
        write(&String::from_utf8_lossy(&piece[..whole]))?;
        kept = piece.len() - whole;
        buffer.copy_within(whole..whole + kept, 0);
        if count == 0 {
            return Ok(());
        }
    }
}

/// How many bytes at the end of `piece` may be the beginning of a character.
fn split_tail(piece: &[u8]) -> usize {
    let Some(last) = piece.utf8_chunks().last() else {
        return 0;
    };
    let is_unfinished =
        std::str::from_utf8(last.invalid()).is_err_and(|error| error.error_len().is_none());
    if is_unfinished {
        last.invalid().len()
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives at most `size` bytes a read.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.len().min(self.1).min(buffer.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    #[test]
    fn text_becomes_a_string_however_it_is_split() {
        let cases: [(&[u8], &str); 5] = [
            (b"", ""),
            (b"data: \"x\"\n\n\x01", "data: \"x\"\n\n\x01"),
            ("größer \u{1F600}!".as_bytes(), "größer \u{1F600}!"),
            (b"a\xffb\xe2\x82", "a\u{fffd}b\u{fffd}"),
            (b"\xe2\x82\xe2\x82\xac", "\u{fffd}\u{20ac}"),
        ];
        for (bytes, expected) in cases {
            for size in 1..=bytes.len().max(1) {
                let mut out = Vec::new();
                copy_as_string(&mut Trickle(bytes, size), &mut out).unwrap();
                assert_eq!(
                    serde_json::from_slice::<String>(&out).unwrap(),
                    expected,
                    "{size} bytes at a time"
                );
            }
        }
    }
}
