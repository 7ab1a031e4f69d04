//! Whatever way requests are split over writes, and however little the socket takes, what leaves is
//! the requests with their placeholder replaced and everything else untouched.
#![no_main]

#[path = "../../tests/support/wire.rs"]
mod wire;

use libfuzzer_sys::fuzz_target;

/// Byte values with a meaning: a whole placeholder, its front, the next write, the next request.
const WHOLE: u8 = 0xf0;
const FRONT: u8 = 0xf1;
const WRITE: u8 = 0xf2;
const REQUEST: u8 = 0xf3;
const SLICE: u8 = 0xf4;

fuzz_target!(|input: (Vec<u8>, Vec<u8>)| {
    let (script, mut limits) = input;
    if limits.iter().all(|&limit| limit == 0) {
        limits.push(1);
    }
    let injection = wire::injection();
    let placeholder = injection.placeholder();
    let placeholder = placeholder.as_bytes();
    let mut messages: Vec<Vec<Vec<Vec<u8>>>> = vec![vec![vec![vec![]]]];
    let mut script = script.into_iter();
    while let Some(byte) = script.next() {
        let message = messages.last_mut().expect("never empty");
        let write = message.last_mut().expect("never empty");
        let slice = write.last_mut().expect("never empty");
        match byte {
            WHOLE => slice.extend_from_slice(placeholder),
            FRONT => {
                let length = usize::from(script.next().unwrap_or(1)) % placeholder.len();
                slice.extend_from_slice(&placeholder[..length]);
            }
            SLICE => write.push(vec![]),
            WRITE => message.push(vec![vec![]]),
            REQUEST => messages.push(vec![vec![vec![]]]),
            byte => slice.push(byte),
        }
    }
    let messages: Vec<Vec<Vec<&[u8]>>> = messages
        .iter()
        .map(|message| message.iter().map(|write| write.iter().map(Vec::as_slice).collect()).collect())
        .collect();
    assert_eq!(wire::send(&injection, &messages, &limits), wire::expected(&injection, &messages));
});
