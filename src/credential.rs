//! The key: read once from stdin into one locked page, and never copied from there.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::ptr::NonNull;

use zeroize::Zeroize;

use crate::hardening::checked;
use crate::terminal::EchoOff;

/// What the value of the `Authorization` header begins with (RFC 6750, section 2.1).
const SCHEME: &[u8] = b"Bearer ";

/// The longest header value, `Bearer ` included, in bytes. OpenAI's proxy has the same bound.
pub const MAX_CREDENTIAL: usize = 1024;

/// How much is read at the most: the longest key and a CR LF behind it, in bytes.
const MAX_INPUT: usize = MAX_CREDENTIAL - SCHEME.len() + 2;

/// Asked on a terminal.
const PROMPT: &[u8] = b"OpenAI API key (not shown): ";

/// The value of the `Authorization` header, `Bearer ` and the key, in a page of its own.
///
/// The page is locked into memory, left out of core dumps and forks, read-only once the key is in,
/// and wiped when this is dropped. There is no `Clone`, and `Debug` shows nothing of it.
pub struct Credential {
    page: Page,
    length: usize,
}

impl Credential {
    /// Reads the key from fd 0 and puts `/dev/null` in its place, since a file on stdin is a handle
    /// that could be rewound.
    ///
    /// Reads to the first newline or to the end of the input; CR and LF at its end don't count. The
    /// key must match `[A-Za-z0-9_-]+`. On a terminal it is asked for with echo off.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong and what to do, and repeats nothing of what was read.
    pub fn from_stdin() -> Result<Self, String> {
        let credential = match EchoOff::on_stdin(PROMPT) {
            Ok(None) => Self::read(|buffer| read_fd(libc::STDIN_FILENO, buffer)),
            Ok(Some(echo_off)) => Self::read(|buffer| echo_off.read(buffer)),
            Err(error) => Err(format!(
                "cannot turn the terminal's echo off: {error}; pipe the key in instead"
            )),
        }?;
        close_stdin().map_err(|error| format!("cannot replace stdin by /dev/null: {error}"))?;
        Ok(credential)
    }

    /// [`Credential::from_stdin`] from any source: `read` is read(2), fills the front of the buffer
    /// and says how much; 0 is the end.
    ///
    /// # Errors
    ///
    /// As [`Credential::from_stdin`]. The page is wiped first.
    pub fn read(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> Result<Self, String> {
        let mut page = Page::map().map_err(|error| {
            format!("cannot lock a page of memory for the key: {error}; raise RLIMIT_MEMLOCK")
        })?;
        let bytes = page.bytes_mut();
        bytes[..SCHEME.len()].copy_from_slice(SCHEME);
        let input = &mut bytes[SCHEME.len()..SCHEME.len() + MAX_INPUT];
        let mut filled = 0;
        let line = loop {
            let count = match read(&mut input[filled..]) {
                Ok(count) => count,
                Err(error) => return Err(format!("cannot read the key from stdin: {error}")),
            };
            let fresh = filled..filled + count;
            filled = fresh.end;
            if let Some(newline) = input[fresh].iter().position(|&byte| byte == b'\n') {
                break filled - count + newline;
            }
            if count == 0 || filled == input.len() {
                break filled;
            }
        };
        let key = key_range(&input[..line])?;
        let length = SCHEME.len() + key.end;
        bytes[length..].zeroize();
        page.protect()
            .map_err(|error| format!("cannot make the key's page read-only: {error}"))?;
        Ok(Self { page, length })
    }

    /// The header's value. Whoever calls this must hand the bytes to the wire and keep no copy.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        &self.page.bytes()[..self.length]
    }

    /// Overwrites the key wherever the environment holds it and names the variables.
    ///
    /// A key that also sits in `OPENAI_API_KEY` can be read in `/proc/PID/environ` by root, and is a
    /// second copy in any case.
    pub fn scrub_environment(&self) -> Vec<String> {
        let key = &self.expose()[SCHEME.len()..];
        let mut found = Vec::new();
        // SAFETY: `environ` is a null-terminated array of null-terminated strings that this process
        // may write to, and no other thread reads or changes it: none has been started.
        unsafe {
            let mut entry = environ();
            while !entry.is_null() && !(*entry).is_null() {
                let length = libc::strlen(*entry);
                let variable = std::slice::from_raw_parts_mut((*entry).cast::<u8>(), length);
                entry = entry.add(1);
                let Some(equals) = variable.iter().position(|&byte| byte == b'=') else {
                    continue;
                };
                let (name, value) = variable.split_at_mut(equals + 1);
                let mut hit = false;
                while let Some(at) = value.windows(key.len()).position(|window| window == key) {
                    value[at..at + key.len()].fill(b'*');
                    hit = true;
                }
                if hit {
                    found.push(String::from_utf8_lossy(&name[..equals]).into_owned());
                }
            }
        }
        found
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(..)")
    }
}

/// Where in `line` the key lies: all of it but the CRs at its end.
fn key_range(line: &[u8]) -> Result<Range<usize>, String> {
    let end = line
        .iter()
        .rposition(|&byte| byte != b'\r')
        .map_or(0, |last| last + 1);
    let key = &line[..end];
    if key.is_empty() {
        return Err("no key on stdin: pipe one in, as in `printenv OPENAI_API_KEY | codex-responses-api-proxy`".into());
    }
    if SCHEME.len() + key.len() > MAX_CREDENTIAL {
        return Err(format!(
            "the key on stdin is longer than {} bytes: check that it is only the key that is piped in",
            MAX_CREDENTIAL - SCHEME.len()
        ));
    }
    if !key
        .iter()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    {
        return Err(
            "the key on stdin has a character other than ASCII letters, digits, '-' and '_': \
                    check that it is only the key that is piped in, without quotes or spaces"
                .into(),
        );
    }
    Ok(0..end)
}

/// One page of memory that no other allocation shares.
struct Page {
    start: NonNull<u8>,
    size: usize,
}

impl Page {
    /// Maps a zeroed page, locks it (mlock(2)) and keeps it out of dumps and forks (madvise(2)).
    fn map() -> io::Result<Self> {
        // SAFETY: sysconf takes an integer and touches no memory of ours.
        let size = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) })
            .map_err(io::Error::other)?;
        // SAFETY: a new anonymous mapping, which aliases nothing.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANON,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap gave a null page"))?;
        let page = Self { start, size };
        // SAFETY: the range is the mapping just made, whole.
        unsafe { checked(libc::mlock(start.as_ptr().cast(), size))? };
        page.keep_private()?;
        Ok(page)
    }

    #[cfg(target_os = "linux")]
    fn keep_private(&self) -> io::Result<()> {
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // SAFETY: the range is this page, and neither advice changes its content.
            unsafe { checked(libc::madvise(self.start.as_ptr().cast(), self.size, advice))? };
        }
        Ok(())
    }

    /// macOS dumps no core here (`RLIMIT_CORE` is zero), and this program never forks.
    #[cfg(target_os = "macos")]
    fn keep_private(&self) -> io::Result<()> {
        Ok(())
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the page is mapped and readable for as long as `self` lives, initialised by the
        // kernel, and written only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.size) }
    }

    /// Only before [`Page::protect`]; the `&mut` in there and here keeps the two apart in time.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `bytes`, and `&mut self` makes the access exclusive. The page is still writable:
        // the one caller, `Credential::read`, owns it and protects it last.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.size) }
    }

    /// Makes the page read-only.
    fn protect(&mut self) -> io::Result<()> {
        // SAFETY: the range is this page; nothing writes to it until `drop` makes it writable again.
        unsafe {
            checked(libc::mprotect(
                self.start.as_ptr().cast(),
                self.size,
                libc::PROT_READ,
            ))
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let start = self.start.as_ptr().cast();
        // SAFETY: the range is this page, which is made writable before it is wiped, is wiped only
        // if that worked, and is not touched after it is unmapped.
        unsafe {
            if libc::mprotect(start, self.size, libc::PROT_READ | libc::PROT_WRITE) == 0 {
                self.bytes_mut().zeroize();
            }
            libc::munmap(start, self.size);
        }
    }
}

// SAFETY: the page belongs to this value alone, and shared access only ever reads it.
unsafe impl Send for Page {}
// SAFETY: as above.
unsafe impl Sync for Page {}

/// read(2), again when a signal interrupts it, waiting where the descriptor is non-blocking.
pub(crate) fn read_fd(fd: libc::c_int, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`.
        let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
        if let Ok(count) = usize::try_from(count) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => {
                let mut wait = libc::pollfd {
                    fd,
                    events: libc::POLLIN,
                    revents: 0,
                };
                // SAFETY: one pollfd, valid for the call.
                unsafe { libc::poll(&mut wait, 1, -1) };
            }
            _ => return Err(error),
        }
    }
}

fn close_stdin() -> io::Result<()> {
    // SAFETY: the path is a C string; the descriptor that open gives is ours to close.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if null < 0 || libc::dup2(null, libc::STDIN_FILENO) < 0 {
            return Err(io::Error::last_os_error());
        }
        if null != libc::STDIN_FILENO {
            libc::close(null);
        }
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn environ() -> *mut *mut libc::c_char {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: a pointer that the C library defines; it is read by value.
    unsafe { environ }
}

#[cfg(target_os = "macos")]
fn environ() -> *mut *mut libc::c_char {
    // SAFETY: the function takes nothing and returns the address of the C library's pointer.
    unsafe { *libc::_NSGetEnviron() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives `pieces` one a call, then the end.
    fn read_pieces(pieces: &[&[u8]]) -> Result<Credential, String> {
        let mut pieces = pieces.iter().flat_map(|piece| piece.chunks(MAX_INPUT));
        let mut rest: &[u8] = &[];
        Credential::read(move |buffer| {
            if rest.is_empty() {
                rest = pieces.next().unwrap_or_default();
            }
            let count = rest.len().min(buffer.len());
            buffer[..count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            Ok(count)
        })
    }

    #[test]
    fn accepts_a_key_however_it_comes() {
        let longest = vec![b'k'; MAX_CREDENTIAL - SCHEME.len()];
        let longest_line = [&longest[..], b"\r\n"].concat();
        type Case<'a> = (&'a str, &'a [&'a [u8]], &'a [u8]);
        let cases: [Case<'_>; 9] = [
            ("plain", &[b"sk-abc_1"], b"sk-abc_1"),
            ("newline", &[b"sk-abc\n"], b"sk-abc"),
            ("CR LF", &[b"sk-abc\r\n"], b"sk-abc"),
            ("several CRs", &[b"sk-abc\r\r\n"], b"sk-abc"),
            ("short reads", &[b"s", b"k-", b"abc", b"\n"], b"sk-abc"),
            ("CR and LF apart", &[b"sk-abc\r", b"\n"], b"sk-abc"),
            ("a first line only", &[b"sk-abc\nanother\n"], b"sk-abc"),
            ("the longest", &[&longest], &longest),
            ("the longest with CR LF", &[&longest_line], &longest),
        ];
        for (name, pieces, key) in cases {
            let credential = read_pieces(pieces).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(credential.expose(), [b"Bearer ", key].concat(), "{name}");
            assert!(
                credential.page.bytes()[credential.length..]
                    .iter()
                    .all(|&byte| byte == 0),
                "{name}: leftovers"
            );
        }
    }

    #[test]
    fn refuses_anything_else_without_repeating_it() {
        let too_long = vec![b'k'; MAX_CREDENTIAL - SCHEME.len() + 1];
        let cases: [(&str, &[u8], &str); 9] = [
            ("nothing", b"", "no key on stdin"),
            ("a blank line first", b"\nsk-secret", "no key on stdin"),
            ("CRs only", b"\r\r\n", "no key on stdin"),
            ("a space", b"sk secret\n", "a character other than"),
            ("quotes", b"\"sk-secret\"", "a character other than"),
            ("NUL", b"sk-sec\0ret", "a character other than"),
            (
                "not ASCII",
                "sk-sécret".as_bytes(),
                "a character other than",
            ),
            ("CR inside", b"sk\rsecret", "a character other than"),
            ("too long", &too_long, "longer than 1017 bytes"),
        ];
        for (name, input, expected) in cases {
            let error = read_pieces(&[input])
                .err()
                .unwrap_or_else(|| panic!("{name}: accepted"));
            assert!(error.contains(expected), "{name}: {error}");
            assert!(
                !error.contains("secret") && !error.contains("kkk"),
                "{name}: {error}"
            );
        }
    }

    #[test]
    fn debug_shows_nothing() {
        let credential = read_pieces(&[b"sk-secret"]).unwrap();
        assert_eq!(format!("{credential:?}"), "Credential(..)");
    }
}
