//! The key exists once: after 10,000 requests, all of the process's memory holds it in one place, the locked page.

mod support;

use support::skip;

#[cfg(not(target_os = "linux"))]
#[test]
fn after_10_000_requests_the_key_is_in_one_locked_page_and_nowhere_else() {
    skip(
        "reading all of the proxy's memory",
        "this needs /proc/PID/mem, which only Linux has",
    );
}

#[cfg(target_os = "linux")]
#[test]
fn after_10_000_requests_the_key_is_in_one_locked_page_and_nowhere_else() {
    use std::{
        sync::{Arc, Barrier},
        thread,
    };
    use support::{
        client::Client,
        is_root,
        proxy::{KEY, Launch},
        upstream::Upstream,
    };

    const CONNECTIONS: usize = 32;
    const REQUESTS: usize = 10_016;

    if !is_root() {
        return skip("reading all of the proxy's memory", "only root may");
    }
    let all_open = Arc::new(Barrier::new(CONNECTIONS));
    let upstream = Upstream::start(move |exchange| {
        let is_first = exchange.body()? == b"first";
        if is_first {
            // As many connections as clients: none is answered before all are there.
            all_open.wait();
        }
        // Nothing of the request comes back.
        match exchange.head.get("x-answer").unwrap() {
            "whole" => exchange.answer("200 OK", "", &[b'.'; 300]),
            "error" => exchange.answer("401 Unauthorized", "", b"{\"error\":{}}"),
            _ => {
                exchange.begin_events()?;
                exchange.chunk("data: one\n\n")?;
                exchange.chunk("data: two\n\n")?;
                exchange.chunk("")
            }
        }
    });
    // Even a key that is in the environment as well, as with `printenv OPENAI_API_KEY | …`.
    let proxy = Launch::to(&upstream)
        .env("OPENAI_API_KEY", KEY)
        .env("OTHER", format!("a {KEY} b"))
        .start();
    let port = proxy.port;
    let clients: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            thread::spawn(move || {
                let mut client = Client::connect(port);
                for number in 0..REQUESTS / CONNECTIONS {
                    let (answer, status) =
                        [("whole", 200), ("events", 200), ("error", 401)][number % 3];
                    let body = if number == 0 { "first" } else { "another" };
                    // Heads of many lengths: the key never falls on the same place of a buffer.
                    let padding = "p".repeat(number * 7 % 500);
                    let headers = format!(
                        "X-Answer: {answer}\r\nX-Padding: {padding}\r\nAuthorization: mine\r\n"
                    );
                    client.post(&headers, body.as_bytes()).unwrap();
                    assert_eq!(client.response().unwrap().status(), status);
                    if number % 50 == 0 {
                        client
                            .send("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                            .unwrap();
                        assert_eq!(client.response().unwrap().status(), 403);
                    }
                }
                // Kept, so that every connection is still there when the memory is read.
                client
            })
        })
        .collect();
    let clients: Vec<Client> = clients
        .into_iter()
        .map(|client| client.join().unwrap())
        .collect();
    let seen = upstream.seen();
    assert_eq!(seen.len(), REQUESTS);
    let bearer = format!("Bearer {KEY}");
    assert!(
        seen.iter()
            .all(|seen| seen.head.all("authorization") == [&bearer])
    );
    assert!(upstream.connections() >= CONNECTIONS);

    // A thread that ends meanwhile would take its stack from under the reader.
    proxy.freeze();
    let memory = memory::Memory::read(proxy.pid());
    assert!(
        memory.bytes() > 1 << 20,
        "{} bytes are not all of its memory",
        memory.bytes()
    );
    assert!(
        memory.find(b"codex-responses-api-proxy").len() > 1,
        "what must be there is found"
    );
    // The key, and any 15 bytes of it: a piece left in a buffer that was partly overwritten counts, too.
    let whole = memory.find(KEY.as_bytes());
    let [place] = whole.as_slice() else {
        panic!(
            "the key is in {} places: {}",
            whole.len(),
            memory.describe(&whole)
        );
    };
    for part in KEY.as_bytes()["sk-proj-".len()..].chunks_exact(8) {
        let places = memory.find(part);
        assert_eq!(
            places.len(),
            1,
            "a part of the key: {}",
            memory.describe(&places)
        );
    }
    let bearers = memory.find(bearer.as_bytes());
    assert!(bearers.len() <= 1, "{}", memory.describe(&bearers));

    let mapping = memory.mapping(*place);
    assert_eq!(mapping.permissions, "r--p", "{mapping:?}");
    assert!(mapping.kilobytes("Locked") > 0, "{mapping:?}");
    // Locked, not in dumps, not in forks (proc(5)).
    for flag in ["lo", "dd", "dc"] {
        assert!(
            mapping.flags().contains(&flag),
            "{flag} is not in {mapping:?}"
        );
    }
    drop(clients);
}

/// All of another process's memory.
#[cfg(target_os = "linux")]
mod memory {
    use std::{
        fs::{self, File},
        ops::Range,
        os::unix::fs::FileExt,
    };

    #[derive(Debug)]
    pub(crate) struct Mapping {
        range: Range<u64>,
        pub(crate) permissions: String,
        name: String,
        /// What smaps says of it, line by line.
        details: Vec<(String, String)>,
    }

    impl Mapping {
        fn detail(&self, name: &str) -> &str {
            let detail = self.details.iter().find(|(detail, _)| detail == name);
            &detail.unwrap_or_else(|| panic!("no {name} in {self:?}")).1
        }

        pub(crate) fn kilobytes(&self, name: &str) -> u64 {
            self.detail(name)
                .split(' ')
                .next()
                .unwrap()
                .parse()
                .unwrap()
        }

        pub(crate) fn flags(&self) -> Vec<&str> {
            self.detail("VmFlags").split(' ').collect()
        }
    }

    pub(crate) struct Memory {
        mappings: Vec<(Mapping, Vec<u8>)>,
    }

    impl Memory {
        /// Reads every mapping that can be read. One that says it can, and can't, is a failure.
        pub(crate) fn read(pid: u32) -> Self {
            let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
            let file = File::open(format!("/proc/{pid}/mem")).unwrap();
            let mut mappings: Vec<Mapping> = Vec::new();
            for line in smaps.lines() {
                let mut words = line.split_whitespace();
                let first = words.next().unwrap();
                match (first.strip_suffix(':'), mappings.last_mut()) {
                    (Some(detail), Some(mapping)) => {
                        let value: Vec<_> = words.collect();
                        mapping.details.push((detail.to_owned(), value.join(" ")));
                    }
                    _ => {
                        let (start, end) = first.split_once('-').unwrap();
                        let number = |hex| u64::from_str_radix(hex, 16).unwrap();
                        mappings.push(Mapping {
                            range: number(start)..number(end),
                            permissions: words.next().unwrap().to_owned(),
                            name: words.nth(3).unwrap_or_default().to_owned(),
                            details: Vec::new(),
                        });
                    }
                }
            }
            let mappings = mappings.into_iter().filter_map(|mapping| {
                let size = usize::try_from(mapping.range.end - mapping.range.start).unwrap();
                let mut bytes = vec![0; size];
                match file.read_exact_at(&mut bytes, mapping.range.start) {
                    Ok(()) => Some((mapping, bytes)),
                    // Root may read what the process itself can't; where not even that works, there is nothing.
                    Err(_) if !mapping.permissions.starts_with('r') => None,
                    // The kernel's own pages, which hold its clock.
                    Err(_) if mapping.name.starts_with("[v") => None,
                    Err(error) => panic!("{error}: {mapping:?}"),
                }
            });
            let mappings = mappings.collect();
            Self { mappings }
        }

        pub(crate) fn bytes(&self) -> usize {
            self.mappings.iter().map(|(_, bytes)| bytes.len()).sum()
        }

        /// The addresses where these bytes are.
        pub(crate) fn find(&self, needle: &[u8]) -> Vec<u64> {
            let mut places = Vec::new();
            for (mapping, bytes) in &self.mappings {
                let mut from = 0;
                // `memchr` is quick in a debug build, too.
                while let Some(at) = find_byte(&bytes[from..], needle[0]) {
                    from += at + 1;
                    if bytes[from - 1..].starts_with(needle) {
                        places.push(mapping.range.start + from as u64 - 1);
                    }
                }
            }
            places
        }

        pub(crate) fn mapping(&self, address: u64) -> &Mapping {
            let mut mappings = self.mappings.iter().map(|(mapping, _)| mapping);
            mappings
                .find(|mapping| mapping.range.contains(&address))
                .unwrap()
        }

        /// Where these addresses are, and what is around them.
        pub(crate) fn describe(&self, places: &[u64]) -> String {
            let mut text = String::new();
            for &place in places {
                let (mapping, bytes) = self
                    .mappings
                    .iter()
                    .find(|(mapping, _)| mapping.range.contains(&place))
                    .unwrap();
                let at = usize::try_from(place - mapping.range.start).unwrap();
                let around = &bytes[at.saturating_sub(80)..bytes.len().min(at + 120)];
                let (range, name) = (&mapping.range, &mapping.name);
                text += &format!(
                    "\n{place:x} in {range:x?} {name}: {}",
                    around.escape_ascii()
                );
            }
            text
        }
    }

    fn find_byte(hay: &[u8], needle: u8) -> Option<usize> {
        // SAFETY: `memchr` reads at most `hay.len()` bytes from `hay`.
        #[allow(unsafe_code)]
        let found = unsafe { libc::memchr(hay.as_ptr().cast(), needle.into(), hay.len()) };
        (!found.is_null()).then(|| found.addr() - hay.as_ptr().addr())
    }
}
