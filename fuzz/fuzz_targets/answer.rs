//! Whatever an upstream answers and however it is split over reads, it means the same, and nothing is
//! in the data that did not come.
#![no_main]

use codex_responses_proxy::answer::{Malformed, parse};
use libfuzzer_sys::fuzz_target;

/// What an answer comes to: its status, its data, whether that is all, and how many bytes it was.
type Outcome = Result<Option<(u16, Vec<u8>, bool, usize)>, Malformed>;

/// Reads an answer that comes in pieces of these lengths, again and again.
fn read(bytes: &[u8], lengths: &[u8]) -> Outcome {
    let mut lengths = lengths.iter().map(|&length| usize::from(length).max(1)).cycle();
    let mut head = None;
    let (mut begin, mut end) = (0, 0);
    let mut data = Vec::new();
    while end < bytes.len() {
        end = (end + lengths.next().unwrap_or(bytes.len())).min(bytes.len());
        if head.is_none() {
            head = parse(&bytes[begin..end])?;
            begin += head.as_ref().map_or(0, |head| head.length);
        }
        if let Some(head) = &mut head {
            begin += head.body.decode(&bytes[begin..end], &mut data)?;
        }
    }
    Ok(head.map(|head| {
        let status = head.response.status().as_u16();
        (status, data, head.body.is_complete(), begin)
    }))
}

fuzz_target!(|input: (Vec<u8>, Vec<u8>)| {
    let (bytes, lengths) = input;
    let whole = read(&bytes, &[]);
    let split = read(&bytes, &lengths);
    match (&whole, &split) {
        (Ok(whole), Ok(split)) => assert_eq!(whole, split),
        // A head that is too large or malformed late may be told from half of it.
        (whole, split) => assert!(whole.is_err() && split.is_err(), "{whole:?}, {split:?}"),
    }
    if let Ok(Some((_, data, _, length))) = whole {
        assert!(data.len() <= length && length <= bytes.len());
    }
});
