//! Puts the key on the wire: a stream between hyper and TLS that replaces a placeholder.
//!
//! hyper keeps the head it last wrote in a buffer for the life of a connection, and a header map's
//! values end up all over the heap. So hyper is given a placeholder that is worth nothing, and the
//! key takes its place only in the list of slices that goes to TLS, which encrypts what it copies
//! from there in place. The key is never copied by this program.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use hyper::header::HeaderValue;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::credential::Credential;

/// How many random bytes a placeholder is made of.
const PLACEHOLDER_ENTROPY: usize = 16;

/// The first byte of every placeholder. It occurs nowhere else in one, so that a search that fails
/// in the middle of a placeholder need not go back.
const MARK: u8 = b'~';

/// More slices than this in one write are left for the next; hyper sends at most 64.
const MAX_SLICES: usize = 72;

/// The `Authorization` value that hyper sees, and the credential that the upstream sees.
pub struct Injection {
    placeholder: Vec<u8>,
    credential: Credential,
}

impl Injection {
    /// Pairs the credential with a new random placeholder.
    ///
    /// # Errors
    ///
    /// When the system has no random bytes to give.
    pub fn new(credential: Credential) -> Result<Self, String> {
        let random = random_bytes()
            .map_err(|error| format!("cannot get random bytes from the system: {error}"))?;
        Ok(Self::with_random(credential, &random))
    }

    /// [`Injection::new`] with random bytes from elsewhere.
    #[must_use]
    pub fn with_random(credential: Credential, random: &[u8]) -> Self {
        let hex = random.iter().flat_map(|byte| [byte >> 4, byte & 15]);
        let digits = hex.map(|digit| b"0123456789abcdef"[usize::from(digit)]);
        Self {
            placeholder: std::iter::once(MARK).chain(digits).collect(),
            credential,
        }
    }

    /// What to put into a request in place of the credential.
    #[must_use]
    pub fn placeholder(&self) -> HeaderValue {
        HeaderValue::from_bytes(&self.placeholder)
            .expect("a mark and hex digits are a header value")
    }
}

/// Random bytes from the system (getentropy(3)).
///
/// Not from the TLS library: its generator gathers entropy of its own first, for some 40 ms.
#[allow(unsafe_code)]
fn random_bytes() -> io::Result<[u8; PLACEHOLDER_ENTROPY]> {
    let mut bytes = [0; PLACEHOLDER_ENTROPY];
    // SAFETY: the call writes `bytes.len()` bytes to `bytes`.
    let returned = unsafe { libc::getentropy(bytes.as_mut_ptr().cast(), bytes.len()) };
    if returned == 0 {
        Ok(bytes)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Tells an [`InjectingStream`] that a request is about to be written to it.
#[derive(Clone, Default)]
pub struct Arm(Rc<Cell<Armed>>);

/// Whether a placeholder is expected.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Armed {
    /// No: a request's head is out.
    #[default]
    No,
    /// Yes, and the request has not begun.
    Anew,
    /// Yes, in the request that has begun.
    Yes,
}

impl Arm {
    /// The next placeholder that is written is replaced, and only that one: what follows is a body,
    /// and bodies are nobody's to change.
    pub fn next_request(&self) {
        self.0.set(Armed::Anew);
    }
}

/// Bytes that the layer above was told are written and the layer below has not taken yet.
enum Owed {
    /// A part of the credential.
    Credential(Range<usize>),
    /// The front of a placeholder that turned out to be none.
    Placeholder(Range<usize>),
}

/// A stream that replaces the placeholder in each request it was armed for.
pub struct InjectingStream<S> {
    io: S,
    injection: Rc<Injection>,
    arm: Arm,
    /// How much of a placeholder the bytes written so far end with; these were held back.
    matched: usize,
    owed: Option<Owed>,
    /// Writing failed because the other side is gone.
    is_cut_off: bool,
}

/// What a search for the placeholder found; positions count from the first byte given.
enum Found {
    /// A placeholder at this place; its beginning may have been held back.
    Whole { start: usize, end: usize },
    /// No placeholder, but its first `matched` bytes at the end, from `start` on.
    Partly { start: usize, matched: usize },
    /// What was held back is no placeholder.
    Mistaken,
}

impl<S> InjectingStream<S> {
    /// Wraps `io`.
    pub fn new(io: S, injection: Rc<Injection>, arm: Arm) -> Self {
        Self {
            io,
            injection,
            arm,
            matched: 0,
            owed: None,
            is_cut_off: false,
        }
    }

    /// The wrapped stream.
    pub fn get_ref(&self) -> &S {
        &self.io
    }

    fn find(&self, bufs: &[IoSlice<'_>]) -> Found {
        let placeholder = &self.injection.placeholder[..];
        let mut matched = self.matched;
        let mut position: usize = 0;
        for &byte in bufs.iter().flat_map(|buf| buf.iter()) {
            position += 1;
            if byte == placeholder[matched] {
                matched += 1;
                if matched == placeholder.len() {
                    return Found::Whole {
                        start: position.saturating_sub(matched),
                        end: position,
                    };
                }
            } else if matched >= position {
                return Found::Mistaken;
            } else {
                matched = usize::from(byte == MARK);
            }
        }
        Found::Partly {
            start: position.saturating_sub(matched),
            matched,
        }
    }
}

impl<S: AsyncWrite + Unpin> InjectingStream<S> {
    fn poll_owed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(owed) = &mut self.owed {
            let (bytes, range) = match owed {
                Owed::Credential(range) => (self.injection.credential.expose(), range),
                Owed::Placeholder(range) => (&self.injection.placeholder[..], range),
            };
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, &bytes[range.clone()]))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            range.start += count;
            if range.start == range.end {
                self.owed = None;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Lets go of what was held back: it was not the beginning of a placeholder.
    fn release(&mut self) {
        if self.matched > 0 {
            self.owed = Some(Owed::Placeholder(0..self.matched));
            self.matched = 0;
        }
    }

    /// Writes `bufs` with the credential in place of `start..end`.
    fn poll_inject(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
        start: usize,
        end: usize,
    ) -> Poll<io::Result<usize>> {
        let credential = self.injection.credential.expose();
        let mut slices = Slices::default();
        slices.extend(bufs, 0..start);
        slices.push(credential);
        slices.extend(bufs, end..usize::MAX);
        let count = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices.get()))?;
        if count <= start && (start > 0 || count == 0) {
            return Poll::Ready(Ok(count));
        }
        let sent = count - start;
        self.arm.0.set(Armed::No);
        self.matched = 0;
        if sent < credential.len() {
            self.owed = Some(Owed::Credential(sent..credential.len()));
            return Poll::Ready(Ok(end));
        }
        Poll::Ready(Ok(end + sent - credential.len()))
    }

    /// Writes `bufs` with whatever has to change in them.
    fn poll_replaced(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.arm.0.get() == Armed::Anew {
            self.release();
            self.arm.0.set(Armed::Yes);
        }
        loop {
            ready!(self.poll_owed(cx))?;
            if self.arm.0.get() == Armed::No {
                return Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
            }
            match self.find(bufs) {
                Found::Whole { start, end } => return self.poll_inject(cx, bufs, start, end),
                Found::Mistaken => self.release(),
                Found::Partly { matched: 0, .. } => {
                    return Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
                }
                Found::Partly { start, matched } => {
                    if start > 0 {
                        let mut slices = Slices::default();
                        slices.extend(bufs, 0..start);
                        let count =
                            ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices.get()))?;
                        if count < start {
                            return Poll::Ready(Ok(count));
                        }
                    }
                    self.matched = matched;
                    return Poll::Ready(Ok(bufs.iter().map(|buf| buf.len()).sum()));
                }
            }
        }
    }

    /// Lets the reader find out that the other side is gone.
    ///
    /// An upstream that answers early and closes makes writing fail while its answer waits to be
    /// read. hyper gives up on the first error, so a write that fails for this reason never ends, and
    /// reading gives first the answer and then the end.
    fn leave_to_reader<T>(
        &mut self,
        cx: &Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match outcome {
            Poll::Ready(Err(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                if !self.is_cut_off {
                    self.is_cut_off = true;
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            }
            outcome => outcome,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for InjectingStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let outcome = this.poll_replaced(cx, bufs);
        this.leave_to_reader(cx, outcome)
    }

    /// Always true: with separate slices the head is never copied together with a body, and the
    /// credential goes out in the same write as the rest of its head.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = match this.poll_owed(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut this.io).poll_flush(cx),
            other => other,
        };
        this.leave_to_reader(cx, outcome)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_owed(cx))?;
        this.release();
        ready!(this.poll_owed(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for InjectingStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_read(cx, buf)
    }
}

/// A list of slices on the stack.
struct Slices<'a> {
    slices: [IoSlice<'a>; MAX_SLICES],
    count: usize,
}

impl Default for Slices<'_> {
    fn default() -> Self {
        Self {
            slices: [IoSlice::new(&[]); MAX_SLICES],
            count: 0,
        }
    }
}

impl<'a> Slices<'a> {
    /// Adds a slice. One too many is left out: a short write, which the writer above continues.
    fn push(&mut self, slice: &'a [u8]) {
        if !slice.is_empty() && self.count < MAX_SLICES {
            self.slices[self.count] = IoSlice::new(slice);
            self.count += 1;
        }
    }

    /// Adds the bytes of `bufs` that lie in `range`, counted over all of them.
    fn extend(&mut self, bufs: &'a [IoSlice<'_>], range: Range<usize>) {
        let mut offset = 0;
        for buf in bufs {
            let start = range.start.saturating_sub(offset).min(buf.len());
            let end = range.end.saturating_sub(offset).min(buf.len());
            self.push(&buf[start..end]);
            offset += buf.len();
        }
    }

    fn get(&self) -> &[IoSlice<'a>] {
        &self.slices[..self.count]
    }
}
