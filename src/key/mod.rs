//! The credential: read from stdin once, written to the upstream as one header line.
//!
//! It lies in a page of its own and is never copied from there. Nothing here knows HTTP.

pub(crate) mod environment;
mod prompt;

use std::io::{self, stdin};
use std::{ffi::OsString, fs::File, ops::Range, os::fd::AsFd};

use memmap2::{Mmap, MmapMut};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zeroize::Zeroize;

/// The size of the key's page, in bytes; the kernel rounds it up to whole pages.
const PAGE: usize = 4096;

/// The header line up to the key (RFC 6750, section 2.1).
const PREFIX: &[u8] = b"authorization: Bearer ";

/// The most that is read from stdin, in bytes: the rest of the page behind the prefix.
const MAX_INPUT: usize = PAGE - PREFIX.len();

/// The keys that are accepted: ASCII letters, digits, and some other characters.
#[derive(Clone, Copy)]
pub struct KeyRule {
    /// The longest key, in bytes.
    pub max_length: usize,
    /// Other characters; `=` only at the end, as base64's padding.
    others: &'static [u8],
}

impl KeyRule {
    /// OpenAI's keys. OpenAI's proxy has the same limit, 1,024 bytes with `Bearer `.
    pub const OPENAI: Self = Self {
        max_length: 1024 - b"Bearer ".len(),
        others: b"-_",
    };

    /// Bearer tokens (RFC 6750, section 2.1, `b68token`) that fit the page together with the header's name and
    /// CR LF. Some gateways also use `:` and `|`.
    pub const BEARER_TOKEN: Self = Self {
        max_length: MAX_INPUT - b"\r\n".len(),
        others: b"-._~+/:|=",
    };
}

/// The header line `authorization: Bearer KEY`, its CR LF included.
///
/// It can be neither cloned nor formatted. Dropping it wipes it.
pub struct Credential {
    /// The page, read-only; `None` only while it is dropped.
    page: Option<Mmap>,
    /// The length of the line at its start, in bytes.
    length: usize,
}

impl Credential {
    /// Reads the key from stdin up to the first newline or the end of the input, without a byte order mark and
    /// white space around it. On a terminal, prompts with the echo off. Then replaces stdin by `/dev/null`: a
    /// file on stdin is a handle that could be rewound.
    ///
    /// # Errors
    ///
    /// A message that says what to do and repeats nothing of what was read.
    pub fn from_stdin(rule: KeyRule) -> Result<Self, String> {
        let echo = prompt::EchoGuard::disable_and_prompt().map_err(|error| {
            format!("cannot turn the terminal's echo off: {error}; pipe the key in instead")
        })?;
        let mut is_over = false;
        // Owns the guard, so that the echo is on again once the key has been read.
        let credential = Self::read(rule, move |buffer| {
            // A read from a terminal returns one line, whichever character ended it.
            let is_over = std::mem::replace(&mut is_over, echo.is_some());
            if is_over { Ok(0) } else { read_stdin(buffer) }
        })?;
        File::open("/dev/null")
            .and_then(|null| Ok(nix::unistd::dup2_stdin(null)?))
            .map_err(|error| format!("cannot replace stdin by /dev/null: {error}"))?;
        Ok(credential)
    }

    /// [`Credential::from_stdin`] from any source: `read` fills the front of the buffer and returns the number of
    /// bytes, like read(2); 0 is the end.
    ///
    /// # Errors
    ///
    /// As [`Credential::from_stdin`]. The page is wiped first.
    pub fn read(
        rule: KeyRule,
        mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
    ) -> Result<Self, String> {
        let mut page = locked_page().map_err(|error| {
            format!("cannot lock a page of memory for the key: {error}; raise RLIMIT_MEMLOCK")
        })?;
        let (prefix, input) = page.split_at_mut(PREFIX.len());
        prefix.copy_from_slice(PREFIX);
        let mut find = || {
            let mut filled = 0;
            while filled < MAX_INPUT && !input[..filled].contains(&b'\n') {
                match read(&mut input[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) => return Err(format!("cannot read the key from stdin: {error}")),
                }
            }
            find_key(rule, &input[..filled])
        };
        let key = find().inspect_err(|_| input.zeroize())?;
        let length = PREFIX.len() + key.len() + 2;
        input.copy_within(key, 0);
        page[length - 2..].zeroize();
        page[length - 2..length].copy_from_slice(b"\r\n");
        let page = page.make_read_only().map(Some);
        let page = page.map_err(|error| format!("cannot make the key read-only: {error}"))?;
        Ok(Self { page, length })
    }

    /// The line. The caller must write the bytes to the wire and keep no copy.
    pub fn header_line(&self) -> &[u8] {
        &self.page.as_deref().unwrap_or_default()[..self.length]
    }

    /// Overwrites the key wherever the environment contains it and returns the variables' names.
    ///
    /// Such a key is a second copy, and root can read it in `/proc/PID/environ`. To be called only while there
    /// is one thread.
    pub fn scrub_environment(&self) -> Vec<OsString> {
        let key = self.header_line()[PREFIX.len()..].trim_ascii_end();
        environment::visit_variables(|_, value| {
            let mut is_found = false;
            while let Some(at) = value.windows(key.len()).position(|window| window == key) {
                value[at..at + key.len()].fill(b'*');
                is_found = true;
            }
            is_found
        })
    }
}

impl Drop for Credential {
    fn drop(&mut self) {
        if let Some(Ok(mut page)) = self.page.take().map(Mmap::make_mut) {
            page.zeroize();
        }
    }
}

/// Maps a zeroed page, locks it (mlock(2)) and excludes it from core dumps and forks (madvise(2)).
fn locked_page() -> io::Result<MmapMut> {
    let page = MmapMut::map_anon(PAGE)?;
    page.lock()?;
    // macOS writes no core dump here (`RLIMIT_CORE` is zero), and this program never forks.
    #[cfg(target_os = "linux")]
    for advice in [memmap2::Advice::DontDump, memmap2::Advice::DontFork] {
        page.advise(advice)?;
    }
    Ok(page)
}

/// read(2) without a buffer of std's in between. Retries when interrupted, and waits if the descriptor is
/// non-blocking.
fn read_stdin(buffer: &mut [u8]) -> io::Result<usize> {
    let stdin = stdin();
    let mut wait = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    loop {
        match nix::unistd::read(&stdin, buffer) {
            Err(Errno::EINTR | Errno::EAGAIN) => _ = poll(&mut wait, PollTimeout::NONE),
            outcome => return Ok(outcome?),
        }
    }
}

/// The range of the key in `input`: the first line without a byte order mark and white space around it.
fn find_key(rule: KeyRule, input: &[u8]) -> Result<Range<usize>, String> {
    let end = input.iter().position(|&byte| byte == b'\n');
    let line = &input[..end.unwrap_or(input.len())];
    // Some editors put a byte order mark in front of UTF-8 text.
    let text = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
    let start = line.len() - text.trim_ascii_start().len();
    let key = text.trim_ascii();
    let (max, others) = (rule.max_length, rule.others.escape_ascii());
    let mut from_equals = key.iter().skip_while(|&&byte| byte != b'=');
    let is_allowed = |byte: &u8| byte.is_ascii_alphanumeric() || rule.others.contains(byte);
    let error = if key.is_empty() {
        "no key on stdin: pipe it in (`printenv OPENAI_API_KEY | codex-responses-api-proxy`)".into()
    } else if line.len() == MAX_INPUT || key.len() > max {
        // A line that fills the page may go on behind it.
        format!("the key on stdin is longer than {max} bytes: pipe in nothing but the key")
    } else if from_equals.any(|&byte| byte != b'=') {
        "stdin contains NAME=value: pipe in the bare key, without a name".into()
    } else if !key.iter().all(is_allowed) || key[0] == b'=' {
        format!(
            "the key on stdin has a character other than ASCII letters, digits and {others}: check that it is \
             only the key that is piped in, without quotes or spaces, and that --upstream-url is its provider's"
        )
    } else {
        return Ok(start..start + key.len());
    };
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPENAI: KeyRule = KeyRule::OPENAI;
    const TOKEN_RULE: KeyRule = KeyRule::BEARER_TOKEN;

    /// Reads `pieces`, one per call, then the end of the input.
    fn read_pieces(rule: KeyRule, pieces: &[&[u8]]) -> Result<Credential, String> {
        let mut pieces = pieces.iter().copied();
        let mut rest: &[u8] = &[];
        Credential::read(rule, move |buffer| {
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
    fn accepts_keys_however_they_arrive() {
        const TOKEN: &[u8] = b"eyJhbGciOiJSUzI1NiJ9.e30.c2ln-_~";
        let longest = vec![b'k'; OPENAI.max_length];
        let longest_line = [&longest[..], b"\r\n"].concat();
        let longest_token = vec![b'k'; 4072];
        let longest_token_line = [&longest_token[..], b"\r\n"].concat();
        type Case<'a> = (&'a str, KeyRule, &'a [&'a [u8]], &'a [u8]);
        let cases: [Case<'_>; 22] = [
            ("plain", OPENAI, &[b"sk-abc_1"], b"sk-abc_1"),
            ("newline", OPENAI, &[b"sk-abc\n"], b"sk-abc"),
            ("CR LF", OPENAI, &[b"sk-abc\r\n"], b"sk-abc"),
            ("several CRs", OPENAI, &[b"sk-abc\r\r\n"], b"sk-abc"),
            (
                "short reads",
                OPENAI,
                &[b"s", b"k-", b"abc", b"\n"],
                b"sk-abc",
            ),
            ("CR and LF apart", OPENAI, &[b"sk-abc\r", b"\n"], b"sk-abc"),
            (
                "a first line only",
                OPENAI,
                &[b"sk-abc\nanother\n"],
                b"sk-abc",
            ),
            ("blanks around", OPENAI, &[b" \t sk-abc \t\r\n"], b"sk-abc"),
            (
                "byte order mark",
                OPENAI,
                &[b"\xef\xbb\xbfsk-abc\r\n"],
                b"sk-abc",
            ),
            (
                "mark, blank",
                OPENAI,
                &[b"\xef", b"\xbb\xbf sk-abc"],
                b"sk-abc",
            ),
            ("the longest", OPENAI, &[&longest], &longest),
            ("the longest with CR LF", OPENAI, &[&longest_line], &longest),
            (
                "blanks, longest",
                OPENAI,
                &[b"   ", &longest_line],
                &longest,
            ),
            ("JWT", TOKEN_RULE, &[TOKEN, b"\n"], TOKEN),
            ("base64", TOKEN_RULE, &[b"QUJD/+RA==\n"], b"QUJD/+RA=="),
            ("one padding", TOKEN_RULE, &[b"abc=\n"], b"abc="),
            (
                "words, padding",
                TOKEN_RULE,
                &[b"ABSK_abc=="],
                b"ABSK_abc==",
            ),
            (
                "gateway",
                TOKEN_RULE,
                &[b"id:name|secret~1"],
                b"id:name|secret~1",
            ),
            ("OpenAI's", TOKEN_RULE, &[b"sk-abc_1\n"], b"sk-abc_1"),
            (
                "longest token",
                TOKEN_RULE,
                &[&longest_token],
                &longest_token,
            ),
            (
                "with CR LF",
                TOKEN_RULE,
                &[&longest_token_line],
                &longest_token,
            ),
            ("in bytes", TOKEN_RULE, &[b" ", b"a", b"=", b"\n"], b"a="),
        ];
        for (name, rule, pieces, key) in cases {
            let credential =
                read_pieces(rule, pieces).unwrap_or_else(|error| panic!("{name}: {error}"));
            let line = [b"authorization: Bearer ", key, b"\r\n"].concat();
            assert_eq!(credential.header_line(), line, "{name}");
            assert!(
                credential.page.as_deref().unwrap()[credential.length..]
                    .iter()
                    .all(|&byte| byte == 0),
                "{name}: leftovers"
            );
        }
    }

    #[test]
    fn rejects_other_input_without_repeating_it() {
        const CHARACTER: &str = "a character other than";
        let too_long = vec![b'k'; OPENAI.max_length + 1];
        let token_too_long = vec![b'k'; 4073];
        // Bytes behind the blanks are not read.
        let cut = [b"sk-secret".as_slice(), &[b' '; 5000], b"x"].concat();
        let cases: [(&str, KeyRule, &[u8], &str); 23] = [
            (
                "a name",
                OPENAI,
                b"OPENAI_API_KEY=sk-secret\n",
                "NAME=value",
            ),
            (
                "a name in quotes",
                OPENAI,
                b"KEY=\"sk-secret\"\n",
                "NAME=value",
            ),
            ("an interrupt", OPENAI, b"sk-secret\x03", CHARACTER),
            ("nothing", OPENAI, b"", "no key on stdin"),
            (
                "a blank line first",
                OPENAI,
                b"\nsk-secret",
                "no key on stdin",
            ),
            ("CRs only", OPENAI, b"\r\r\n", "no key on stdin"),
            ("blanks only", OPENAI, b" \t\n", "no key on stdin"),
            (
                "a mark only",
                TOKEN_RULE,
                b"\xef\xbb\xbf\n",
                "no key on stdin",
            ),
            ("a space", OPENAI, b"sk secret\n", CHARACTER),
            ("quotes", OPENAI, b"\"sk-secret\"", CHARACTER),
            ("NUL", OPENAI, b"sk-sec\0ret", CHARACTER),
            ("not ASCII", OPENAI, "sk-s\u{e9}cret".as_bytes(), CHARACTER),
            ("CR inside", OPENAI, b"sk\rsecret", CHARACTER),
            ("mark inside", OPENAI, b" \xef\xbb\xbfsk-secret", CHARACTER),
            ("padding", OPENAI, b"secret==", "--upstream-url"),
            ("a dot", OPENAI, b"secret.x", "--upstream-url"),
            ("too long", OPENAI, &too_long, "longer than 1017 bytes"),
            ("cut off", OPENAI, &cut, "longer than 1017 bytes"),
            ("a space", TOKEN_RULE, b"Bearer secret", CHARACTER),
            ("only padding", TOKEN_RULE, b"==\n", CHARACTER),
            ("a named token", TOKEN_RULE, b"KEY=secret==\n", "NAME=value"),
            ("padding inside", TOKEN_RULE, b"sec-ret=x", "NAME=value"),
            (
                "long token",
                TOKEN_RULE,
                &token_too_long,
                "longer than 4072",
            ),
        ];
        for (name, rule, input, expected) in cases {
            let error = read_pieces(rule, &[input])
                .err()
                .unwrap_or_else(|| panic!("{name}: accepted"));
            assert!(error.contains(expected), "{name}: {error}");
            assert!(
                !error.contains("secret") && !error.contains("kkk"),
                "{name}: {error}"
            );
        }
    }
}
