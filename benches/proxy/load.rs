//! The load: raw HTTP/1.1 over loopback, as lean as it can be, so that the proxy is what is measured.

use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, spawn_local};

use crate::wire::{self, Chunks, Task};

/// What is read from a proxy at once.
const READ_BYTES: usize = 16 << 10;

/// What of a large body is written at once.
const WRITE_BYTES: usize = 256 << 10;

/// How long a new connection may go unserved, and how many are tried.
const PATIENCE: Duration = Duration::from_secs(1);
const ATTEMPTS: usize = 5;

/// A connection to the proxy.
pub(crate) struct Client {
    pub(crate) tcp: TcpStream,
    port: u16,
    pub(crate) input: Vec<u8>,
}

pub(crate) fn broken(what: &str) -> io::Error {
    io::Error::other(what.to_owned())
}

impl Client {
    pub(crate) async fn connect(port: u16) -> io::Result<Self> {
        let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
        tcp.set_nodelay(true)?;
        Ok(Self {
            tcp,
            port,
            input: vec![0; READ_BYTES],
        })
    }

    /// Connects and lets `first` use the connection; anew if that takes longer than [`PATIENCE`].
    ///
    /// OpenAI's proxy now and then leaves a connection unserved while others are busy.
    pub(crate) async fn served<T>(
        port: u16,
        first: impl AsyncFn(&mut Self) -> io::Result<T>,
    ) -> io::Result<(Self, T)> {
        for _ in 0..ATTEMPTS {
            let mut client = Self::connect(port).await?;
            if let Ok(outcome) = tokio::time::timeout(PATIENCE, first(&mut client)).await {
                return Ok((client, outcome?));
            }
        }
        Err(broken("the proxy serves no connection"))
    }

    /// [`Client::served`] with a small request.
    pub(crate) async fn warm(port: u16) -> io::Result<Self> {
        let request = wire::small_request(port, Task::Answer);
        let served = Self::served(port, async |client| client.exchange(&request).await);
        Ok(served.await?.0)
    }

    /// Reads the head of an answer that must be 200; gives where it ends and what has come.
    async fn head(&mut self) -> io::Result<(usize, usize)> {
        let mut filled = 0;
        loop {
            match self.tcp.read(&mut self.input[filled..]).await? {
                0 => return Err(broken("the proxy closed the connection")),
                count => filled += count,
            }
            if let Some(end) = wire::head_end(&self.input[..filled]) {
                if self.input.get(9..12) != Some(b"200") {
                    let head = String::from_utf8_lossy(&self.input[..end]);
                    return Err(broken(&format!("not a 200: {head}")));
                }
                return Ok((end, filled));
            }
        }
    }

    /// Reads an answer to its end; gives the stamp in it.
    async fn answer(&mut self) -> io::Result<u64> {
        let (end, mut filled) = self.head().await?;
        let head = &self.input[..end];
        let mut data = Vec::new();
        match wire::content_length(head) {
            Some(length) => {
                while filled < end + length {
                    match self.tcp.read(&mut self.input[filled..]).await? {
                        0 => return Err(broken("the answer was broken off")),
                        count => filled += count,
                    }
                }
                return wire::stamp(&self.input[end..]).ok_or_else(|| broken("no stamp"));
            }
            None => {
                let mut chunks = Chunks::default();
                let mut more = chunks.feed(&self.input[end..filled], &mut data);
                while more {
                    let count = self.tcp.read(&mut self.input).await?;
                    if count == 0 {
                        return Err(broken("the answer was broken off"));
                    }
                    more = chunks.feed(&self.input[..count], &mut data);
                }
            }
        }
        wire::stamp(&data).ok_or_else(|| broken("no stamp"))
    }

    /// Sends a whole request that was made before, and reads its answer.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> io::Result<u64> {
        self.tcp.write_all(request).await?;
        self.answer().await
    }

    /// Sends a body of `length` bytes and waits until the upstream has all of it.
    pub(crate) async fn upload(&mut self, length: usize) -> io::Result<()> {
        let head = wire::request_head(self.port, Task::Answer, length);
        self.tcp.write_all(&head).await?;
        let block = vec![b'x'; WRITE_BYTES];
        let mut left = length;
        while left > 0 {
            let part = left.min(block.len());
            self.tcp.write_all(&block[..part]).await?;
            left -= part;
        }
        self.answer().await.map(drop)
    }

    /// Sends a head and one byte, the rest after `pause`; gives the nanoseconds until the upstream
    /// saw that byte.
    pub(crate) async fn slow_body(&mut self, pause: Duration) -> io::Result<u64> {
        let request = wire::small_request(self.port, Task::Answer);
        let head = wire::head_end(&request).expect("a request has a head");
        let (first, rest) = request.split_at(head + 1);
        let sent = wire::now();
        self.tcp.write_all(first).await?;
        tokio::time::sleep(pause).await;
        self.tcp.write_all(rest).await?;
        Ok(self.answer().await?.saturating_sub(sent))
    }

    /// Begins a stream and waits for its head.
    pub(crate) async fn stream(&mut self, task: Task) -> io::Result<Events> {
        let request = wire::small_request(self.port, task);
        self.tcp.write_all(&request).await?;
        let (end, filled) = self.head().await?;
        let mut events = Events::default();
        events
            .chunks
            .feed(&self.input[end..filled], &mut events.data);
        Ok(events)
    }
}

/// Where in a stream a client is.
#[derive(Default)]
pub(crate) struct Events {
    pub(crate) chunks: Chunks,
    pub(crate) data: Vec<u8>,
}

/// `count` requests one after the other over one connection, or as many as `bound` allows; gives the
/// nanoseconds of each.
pub(crate) async fn one_by_one(port: u16, count: usize, bound: Duration) -> io::Result<Vec<u64>> {
    let mut client = Client::warm(port).await?;
    let request = wire::small_request(port, Task::Answer);
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < count && begin.elapsed() < bound {
        let sent = Instant::now();
        client.exchange(&request).await?;
        times.push(u64::try_from(sent.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    Ok(times)
}

/// Requests over `connections` connections at once for `length`; gives how many were answered and in
/// what time.
pub(crate) async fn at_once(
    port: u16,
    connections: usize,
    length: Duration,
) -> io::Result<(u64, Duration)> {
    let mut clients = Vec::new();
    for _ in 0..connections {
        clients.push(Client::warm(port).await?);
    }
    let begin = Instant::now();
    let tasks: Vec<JoinHandle<io::Result<u64>>> = clients
        .into_iter()
        .map(|mut client| {
            spawn_local(async move {
                let request = wire::small_request(port, Task::Answer);
                let mut count = 0;
                while begin.elapsed() < length {
                    client.exchange(&request).await?;
                    count += 1;
                }
                Ok(count)
            })
        })
        .collect();
    let mut count = 0;
    for task in tasks {
        count += task.await.map_err(io::Error::other)??;
    }
    Ok((count, begin.elapsed()))
}
