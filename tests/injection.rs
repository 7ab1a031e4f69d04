//! The key takes its placeholder's place on the wire, and nothing else changes.

#[path = "support/wire.rs"]
mod wire;

use wire::{expected, injection, send};

/// A small head, a body with a placeholder in it (which no client can know), and false beginnings.
fn request(placeholder: &[u8]) -> Vec<u8> {
    let head = [
        b"POST / HTTP/1.1\r\nx: ~~30~3\r\nauthorization: ",
        placeholder,
        b"\r\nhost: u\r\n\r\n",
    ]
    .concat();
    [&head[..], b"body ~ ", placeholder, b"~"].concat()
}

#[test]
fn is_replaced_at_every_split_and_with_every_short_write() {
    let injection = injection();
    let request = request(injection.placeholder().as_bytes());
    for split in 0..=request.len() {
        let (front, back) = request.split_at(split);
        for limits in [&[255][..], &[1], &[2, 0, 3], &[0, 7], &[13, 1], &[40]] {
            let as_writes = [vec![vec![front], vec![back]]];
            let as_slices = [vec![vec![front, &[], back]]];
            for messages in [as_writes, as_slices] {
                let sent = send(&injection, &messages, limits);
                let due = expected(&injection, &messages);
                assert_eq!(
                    sent,
                    due,
                    "split at {split}, {limits:?} bytes a write: {}",
                    sent.escape_ascii()
                );
            }
        }
    }
}

#[test]
fn is_replaced_a_byte_at_a_time() {
    let injection = injection();
    let request = request(injection.placeholder().as_bytes());
    let messages = [request.chunks(1).map(|byte| vec![byte]).collect()];
    assert_eq!(
        send(&injection, &messages, &[1]),
        expected(&injection, &messages)
    );
}

#[test]
fn is_replaced_once_in_each_request_of_a_connection() {
    let injection = injection();
    let request = request(injection.placeholder().as_bytes());
    let messages = [
        vec![vec![&request[..]]],
        vec![vec![&request[..]]],
        vec![vec![&request[..]]],
    ];
    let sent = send(&injection, &messages, &[100]);
    assert_eq!(sent, expected(&injection, &messages));
    assert_eq!(
        sent.windows(wire::KEY.len())
            .filter(|window| *window == wire::KEY)
            .count(),
        3
    );
}

#[test]
fn a_placeholder_that_breaks_off_goes_out_as_it_is() {
    let injection = injection();
    let placeholder = injection.placeholder();
    for end in 1..placeholder.len() {
        let part = &placeholder.as_bytes()[..end];
        for messages in [
            [vec![vec![part]]],
            [vec![vec![part], vec![b"\r\n"]]],
            [vec![vec![part], vec![part]]],
        ] {
            assert_eq!(
                send(&injection, &messages, &[3]),
                expected(&injection, &messages),
                "{end} bytes of it"
            );
        }
    }
}

#[test]
fn a_placeholder_is_within_one_request() {
    let injection = injection();
    let placeholder = injection.placeholder();
    let (front, back) = placeholder.as_bytes().split_at(9);
    let messages = [vec![vec![front]], vec![vec![back]]];
    assert_eq!(
        send(&injection, &messages, &[3]),
        expected(&injection, &messages)
    );
}
