//! After a WebSocket handshake, the proxy copies bytes in both directions without buffering, until either end closes.

mod support;

use std::io::Write;
use std::thread;
use support::*;

#[test]
fn bytes_sent_with_the_handshake_arrive() {
    // The second size is larger than any buffer in the proxy.
    for size in [1, 300_000] {
        let upstreams = start_tls_and_plain(move |request| {
            if request.recorded.head.start.starts_with("POST ") {
                return ok(request);
            }
            request.switch_protocols("", &vec![b'u'; size])?;
            let early = request.read_bytes(size)?;
            request.send(early)?;
            request.close()
        });
        for (name, upstream) in upstreams {
            let mut proxy = start_with_websocket(&upstream);
            for post in [
                "",
                "POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
            ] {
                let mut client = proxy.client();
                let socket = client.socket().try_clone().unwrap();
                let bytes = [post, &handshake(""), &"c".repeat(size)].concat();
                // The stand-in reads these bytes only after its own are sent.
                let sender = thread::spawn(move || (&socket).write_all(bytes.as_bytes()));
                if !post.is_empty() {
                    assert_eq!(client.read_response().unwrap().status(), 200, "{name}");
                    proxy.wait_for_request("request ", &[" status=200 "]);
                }
                assert_eq!(client.read_head().unwrap().status(), 101, "{name}: {post}");
                let expected = [vec![b'u'; size], vec![b'c'; size]].concat();
                let received = client.read_bytes(2 * size).unwrap();
                assert!(received == expected, "{name}: {size} bytes differ");
                assert_eq!(client.read_until_closed().unwrap(), b"", "{name}");
                sender.join().unwrap().unwrap();
                drop(client);
                let counts = format!(" in={size} out={}", 2 * size);
                proxy.wait_for_request("request ", &[" status=101 ", &counts]);
            }
            // The handshake after the POST uses the pooled connection. Upgraded connections are never pooled.
            assert_eq!(upstream.connections(), 2, "{name}");
        }
    }
}

#[test]
fn eight_megabytes_arrive_complete_both_ways_at_once() {
    const SIZE: usize = 8 << 20;
    // All blocks differ, so a lost, repeated or misplaced block is detected.
    let bytes: Vec<_> = (0..SIZE as u32 / 4).flat_map(u32::to_be_bytes).collect();
    for (name, upstream) in start_tls_and_plain(echo_tunnel) {
        let mut proxy = start_with_websocket(&upstream);
        let mut client = open_tunnel(&proxy, "");
        let mut socket = client.socket().try_clone().unwrap();
        let received = thread::scope(|scope| {
            let sender = scope.spawn(|| socket.write_all(&bytes));
            let received = client.read_bytes(SIZE).unwrap();
            sender.join().unwrap().unwrap();
            received
        });
        assert!(received == bytes, "{name}: the bytes differ");
        client.shutdown_write();
        assert_eq!(client.read_until_closed().unwrap(), b"", "{name}");
        let counts = format!(" in={SIZE} out={SIZE}");
        let line = proxy.wait_for_request("request ", &[" status=101 ", &counts]);
        assert!(!line.contains("error="), "{name}: {line}");
    }
}

#[test]
fn each_message_arrives_before_the_next_is_sent() {
    for (name, upstream) in start_tls_and_plain(echo_tunnel) {
        let proxy = start_with_websocket(&upstream);
        let mut client = open_tunnel(&proxy, "");
        for number in 0..200 {
            let message = "m".repeat(1 + number * number);
            client.send(&message).unwrap();
            // If the proxy buffered bytes of either end, this would time out.
            let echo = client.read_bytes(message.len()).unwrap();
            assert_eq!(echo, message.as_bytes(), "{name}");
        }
    }
}

#[test]
fn half_close_in_each_direction_leaves_the_other_open() {
    let (forward, forwarded) = channel();
    let upstreams = start_tls_and_plain(move |request| {
        if request.header("x-case") == "client closes" {
            request.switch_protocols("", b"")?;
            let received = request.read_until_closed()?;
            request.send(received)?;
        } else {
            request.switch_protocols("", b"hello")?;
            request.shutdown_write()?;
            forward.send(request.read_until_closed()?).unwrap();
        }
        request.close()
    });
    for (name, upstream) in upstreams {
        let mut proxy = start_with_websocket(&upstream);
        let mut client = open_tunnel(&proxy, "X-Case: client closes\r\n");
        client.send("question").unwrap();
        client.shutdown_write();
        assert_eq!(client.read_until_closed().unwrap(), b"question", "{name}");
        let line = proxy.wait_for_request("request ", &[" status=101 ", " in=8 out=8"]);
        assert!(!line.contains("error="), "{name}: {line}");

        let mut client = open_tunnel(&proxy, "X-Case: upstream closes\r\n");
        assert_eq!(client.read_until_closed().unwrap(), b"hello", "{name}");
        client.send("still here").unwrap();
        client.shutdown_write();
        assert_eq!(forwarded.recv().unwrap(), b"still here", "{name}");
        let line = proxy.wait_for_request("request ", &[" status=101 ", " in=10 out=5"]);
        assert!(!line.contains("error="), "{name}: {line}");
    }
}

/// How an end disconnects, and whether the log shows an error. Codex closes with FIN and without a close frame.
const DISCONNECTS: [(&str, bool); 5] = [
    ("client closes", false),
    ("client resets", true),
    ("upstream closes", false),
    ("upstream closes without close_notify", false),
    ("upstream resets", true),
];

#[test]
fn disconnect_of_either_end_closes_the_other_at_once() {
    let (notify, closed) = channel();
    let upstreams = start_tls_and_plain(move |request| {
        request.switch_protocols("", b"")?;
        request.read_bytes(1)?;
        match request.header("x-case").as_str() {
            "upstream closes" => request.close(),
            "upstream resets" => request.reset(),
            "upstream closes without close_notify" => request.close_abruptly(),
            _ => {
                request.send("x")?;
                notify.send(request.read_until_closed().is_ok()).unwrap();
                request.close()
            }
        }
    });
    for (name, upstream) in upstreams {
        let mut proxy = start_with_websocket(&upstream);
        for (case, is_error) in DISCONNECTS {
            let mut client = open_tunnel(&proxy, &format!("X-Case: {case}\r\n"));
            client.send("x").unwrap();
            if case.starts_with("client") {
                client.read_bytes(1).unwrap();
                match case {
                    "client resets" => client.reset(),
                    _ => drop(client),
                }
                let is_closed = closed.recv_timeout(PROMPT);
                assert!(is_closed.is_ok_and(|closed| closed), "{name}: {case}");
            } else {
                client.socket().set_read_timeout(Some(PROMPT)).unwrap();
                let received = client.read_until_closed();
                assert_eq!(received.unwrap(), b"", "{name}: {case}");
                drop(client);
            }
            let line = proxy.wait_for_request("request ", &[" status=101 ", " in=1 out="]);
            assert_eq!(line.contains("error="), is_error, "{name}: {case}: {line}");
        }
        assert_eq!(proxy.stop().status.code(), Some(0));
    }
}
