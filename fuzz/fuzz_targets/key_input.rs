//! Whatever comes on stdin, in whatever pieces: the key is the first line, or it is refused with a
//! sentence that repeats nothing of it.
#![no_main]

use codex_responses_proxy::key::{Credential, MAX_CREDENTIAL};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<u8>, Vec<u8>)| {
    let (bytes, sizes) = input;
    let mut rest = &bytes[..];
    let mut sizes = sizes.iter().map(|&size| usize::from(size).max(1)).chain(std::iter::repeat(usize::MAX));
    let outcome = Credential::read(|buffer| {
        let count = buffer.len().min(rest.len()).min(sizes.next().unwrap_or(1));
        buffer[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        Ok(count)
    });
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let end = line.iter().rposition(|&byte| byte != b'\r').map_or(0, |last| last + 1);
    let key = &line[..end];
    let is_key = !key.is_empty()
        && key.len() + "Bearer ".len() <= MAX_CREDENTIAL
        && key.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte));
    // So many CRs that they pass the buffer are too much, too.
    let is_within = line.len() <= MAX_CREDENTIAL - "Bearer ".len() + 1;
    match outcome {
        Ok(credential) => {
            assert!(is_key);
            assert_eq!(credential.header_line(), [b"authorization: Bearer ", key, b"\r\n"].concat());
        }
        Err(sentence) => {
            assert!(!is_key || !is_within, "refused a key: {sentence}");
            let repeats = std::str::from_utf8(key).is_ok_and(|key| key.len() > 20 && sentence.contains(key));
            assert!(!repeats, "{sentence}");
        }
    }
});
