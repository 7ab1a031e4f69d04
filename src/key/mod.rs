//! The credential: comes in on stdin, once, and goes out as one header line, to the wire alone.
//!
//! It lies in a page of its own and is never copied from there. Nothing here knows of HTTP.

pub mod environment;
mod page;
mod prompt;

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::{self, stdin};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zeroize::Zeroize;

use self::page::Page;
use self::prompt::EchoOff;

/// What stands before the key in its header line (RFC 6750, section 2.1).
const PREFIX: &[u8] = b"authorization: Bearer ";

/// The longest header value, `Bearer ` included, in bytes. OpenAI's proxy has the same bound.
pub const MAX_CREDENTIAL: usize = 1024;

/// The longest key, in bytes.
const MAX_KEY: usize = MAX_CREDENTIAL - b"Bearer ".len();

/// The header line `authorization: Bearer KEY`, its CR LF included.
///
/// There is no `Clone`, and `Debug` shows nothing of it. Dropping it wipes it.
pub struct Credential {
    page: Page,
    length: usize,
}

impl Credential {
    /// Reads the key from stdin and puts `/dev/null` in its place, since a file on stdin is a handle
    /// that could be rewound.
    ///
    /// Reads to the first newline or to the end of the input; CR and LF at its end don't count. The
    /// key must match `[A-Za-z0-9_-]+`. On a terminal it is asked for with echo off.
    ///
    /// # Errors
    ///
    /// A sentence that says what is wrong and what to do, and repeats nothing of what was read.
    pub fn from_stdin() -> Result<Self, String> {
        let echo_off = EchoOff::and_ask().map_err(|error| {
            format!("cannot turn the terminal's echo off: {error}; pipe the key in instead")
        })?;
        let mut has_read = false;
        let credential = Self::read(|buffer| match std::mem::replace(&mut has_read, true) {
            // A terminal gives one line a read, whichever key ended it.
            true if echo_off.is_some() => Ok(0),
            _ => read_stdin(buffer),
        })?;
        drop(echo_off);
        File::open("/dev/null")
            .and_then(|null| Ok(nix::unistd::dup2_stdin(null)?))
            .map_err(|error| format!("cannot replace stdin by /dev/null: {error}"))?;
        Ok(credential)
    }

    /// [`Credential::from_stdin`] from any source: `read` is read(2), fills the front of the buffer
    /// and says how much; 0 is the end.
    ///
    /// # Errors
    ///
    /// As [`Credential::from_stdin`]. The page is wiped first.
    pub fn read(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> Result<Self, String> {
        let (page, length) = Page::filled(|page| {
            let (prefix, rest) = page.split_at_mut(PREFIX.len());
            prefix.copy_from_slice(PREFIX);
            // The longest key and a CR LF behind it.
            let input = &mut rest[..MAX_KEY + 2];
            let mut filled = 0;
            while filled < input.len() && !input[..filled].contains(&b'\n') {
                match read(&mut input[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) => return Err(format!("cannot read the key from stdin: {error}")),
                }
            }
            let line = input[..filled].split(|&byte| byte == b'\n').next();
            let end = key_length(line.unwrap_or_default())?;
            rest[end..].zeroize();
            rest[end..end + 2].copy_from_slice(b"\r\n");
            Ok(PREFIX.len() + end + 2)
        })?;
        Ok(Self { page, length })
    }

    /// The line. Whoever calls this must hand the bytes to the wire and keep no copy.
    #[must_use]
    pub fn header_line(&self) -> &[u8] {
        &self.page.bytes()[..self.length]
    }

    /// Overwrites the key wherever the environment holds it and names the variables.
    ///
    /// A key that also sits in `OPENAI_API_KEY` can be read in `/proc/PID/environ` by root, and is a
    /// second copy in any case. To be called only while there is one thread.
    #[must_use]
    pub fn scrub_environment(&self) -> Vec<String> {
        let key = &self.header_line()[PREFIX.len()..self.length - 2];
        let names = environment::names_where(|_, value| {
            let mut is_found = false;
            while let Some(at) = value.windows(key.len()).position(|window| window == key) {
                value[at..at + key.len()].fill(b'*');
                is_found = true;
            }
            is_found
        });
        let text = |name: OsString| name.to_string_lossy().into_owned();
        names.into_iter().map(text).collect()
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(..)")
    }
}

/// read(2), with no buffer of std's between; again when a signal interrupts it, and waiting where the
/// descriptor is non-blocking.
fn read_stdin(buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(stdin(), buffer) {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let stdin = stdin();
                let mut wait = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
                let _ = poll(&mut wait, PollTimeout::NONE);
            }
            outcome => return Ok(outcome?),
        }
    }
}

/// How much of `line` is the key: all but the CRs at its end.
fn key_length(line: &[u8]) -> Result<usize, String> {
    let end = line.iter().rposition(|&byte| byte != b'\r');
    let key = &line[..end.map_or(0, |last| last + 1)];
    if key.is_empty() {
        return Err("no key on stdin: pipe one in, as in `printenv OPENAI_API_KEY | codex-responses-api-proxy`".into());
    }
    if key.len() > MAX_KEY {
        return Err(format!(
            "the key on stdin is longer than {MAX_KEY} bytes: check that it is only the key that is piped in"
        ));
    }
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    if let Some(equals) = key.iter().position(|&byte| byte == b'=')
        && key[..equals].iter().all(is_word)
    {
        return Err(
            "what is on stdin looks like NAME=value: give the bare key, without a name before it"
                .into(),
        );
    }
    if !key.iter().all(|byte| is_word(byte) || *byte == b'-') {
        return Err(
            "the key on stdin has a character other than ASCII letters, digits, '-' and '_': \
                    check that it is only the key that is piped in, without quotes or spaces"
                .into(),
        );
    }
    Ok(key.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives `pieces` one a call, then the end.
    fn read_pieces(pieces: &[&[u8]]) -> Result<Credential, String> {
        let mut pieces = pieces.iter().flat_map(|piece| piece.chunks(MAX_KEY + 2));
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
        let longest = vec![b'k'; MAX_KEY];
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
            let line = [b"authorization: Bearer ", key, b"\r\n"].concat();
            assert_eq!(credential.header_line(), line, "{name}");
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
        let too_long = vec![b'k'; MAX_KEY + 1];
        let cases: [(&str, &[u8], &str); 12] = [
            ("a name", b"OPENAI_API_KEY=sk-secret\n", "NAME=value"),
            ("a name in quotes", b"KEY=\"sk-secret\"\n", "NAME=value"),
            ("an interrupt", b"sk-secret\x03", "a character other than"),
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
