//! Arbitrary bytes on stdin, in reads of arbitrary sizes: the key is the first line, or it is rejected with a message
//! that does not repeat it.
#![no_main]

use codex_responses_proxy::key::{Credential, KeyRule};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, Vec<u8>, Vec<u8>)| {
    let (is_openai, bytes, sizes) = input;
    let rule = if is_openai { KeyRule::OPENAI } else { KeyRule::BEARER_TOKEN };
    let mut rest = &bytes[..];
    let mut sizes = sizes.iter().map(|&size| usize::from(size).max(1)).chain(std::iter::repeat(usize::MAX));
    let outcome = Credential::read(rule, |buffer| {
        let count = buffer.len().min(rest.len()).min(sizes.next().unwrap_or(1));
        buffer[..count].copy_from_slice(&rest[..count]);
        rest = &rest[count..];
        Ok(count)
    });
    let line = bytes.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let key = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line).trim_ascii();
    let padding = key.iter().rev().take_while(|&&byte| byte == b'=' && !is_openai).count();
    let others = if is_openai { b"-_".as_slice() } else { b"-._~+/:|" };
    let is_key = key.len() > padding
        && key.len() <= rule.max_length
        && key[..key.len() - padding].iter().all(|byte| byte.is_ascii_alphanumeric() || others.contains(byte));
    // White space counts towards the size of the page.
    let is_within = line.len() <= KeyRule::BEARER_TOKEN.max_length + 1;
    match outcome {
        Ok(credential) => {
            assert!(is_key);
            assert_eq!(credential.header_line(), [b"authorization: Bearer ", key, b"\r\n"].concat());
        }
        Err(message) => {
            assert!(!is_key || !is_within, "rejected a valid key: {message}");
            let repeats = std::str::from_utf8(key).is_ok_and(|key| key.len() > 20 && message.contains(key));
            assert!(!repeats, "{message}");
        }
    }
});
