//! The load: raw HTTP/1.1 over loopback, as lean as it can be, so that the proxy is what is measured.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, spawn_local};

use crate::wire::{self, Chunks, EVENT_BYTES, EVENT_STAMP_AT, Task};

/// What is read from a proxy at once.
const READ_BYTES: usize = 16 << 10;

/// What of a large body is written at once.
const WRITE_BYTES: usize = 256 << 10;

/// How long a stream is given before it is asked for events.
const STEPS_PAUSE: Duration = Duration::from_millis(200);

/// How long a new connection may go unserved, and how many are tried.
const PATIENCE: Duration = Duration::from_secs(1);
const ATTEMPTS: usize = 5;

/// A connection to the proxy.
pub(crate) struct Client {
    tcp: TcpStream,
    port: u16,
    input: Vec<u8>,
}

fn broken(what: &str) -> io::Error {
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
    async fn stream(&mut self, task: Task) -> io::Result<Events> {
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
struct Events {
    chunks: Chunks,
    data: Vec<u8>,
}

/// Nanoseconds from an event's sending to its receipt, while someone wants to know.
#[derive(Default)]
pub(crate) struct Delays {
    pub(crate) recording: Cell<bool>,
    pub(crate) delays: RefCell<Vec<u64>>,
}

impl Delays {
    /// Takes the whole events out of a stream's data.
    fn take(&self, data: &mut Vec<u8>) -> io::Result<()> {
        let now = wire::now();
        let whole = data.len() / EVENT_BYTES * EVENT_BYTES;
        for event in data[..whole].chunks_exact(EVENT_BYTES) {
            let sent = wire::stamp(&event[EVENT_STAMP_AT..]);
            let sent = sent.ok_or_else(|| broken("an event without a stamp"))?;
            if self.recording.get() {
                self.delays.borrow_mut().push(now.saturating_sub(sent));
            }
        }
        data.drain(..whole);
        Ok(())
    }
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

/// Follows `count` streams until the tasks are aborted.
pub(crate) async fn follow(
    port: u16,
    count: usize,
    delays: &Rc<Delays>,
) -> io::Result<Vec<JoinHandle<io::Result<()>>>> {
    let mut tasks = Vec::new();
    for _ in 0..count {
        let delays = Rc::clone(delays);
        tasks.push(spawn_local(async move {
            let stream = async |client: &mut Client| client.stream(Task::Stream).await;
            let (mut client, mut events) = Client::served(port, stream).await?;
            loop {
                delays.take(&mut events.data)?;
                match client.tcp.read(&mut client.input).await? {
                    0 => return Err(broken("a stream was broken off")),
                    read => {
                        let input = &client.input[..read];
                        events.chunks.feed(input, &mut events.data);
                    }
                }
            }
        }));
    }
    Ok(tasks)
}

/// Opens `count` streams, `at_once` at a time, each until its answer has begun.
pub(crate) async fn hold(port: u16, count: usize, at_once: usize) -> io::Result<Vec<Client>> {
    let tasks: Vec<JoinHandle<io::Result<Vec<Client>>>> = (0..at_once)
        .map(|worker| {
            let share = count / at_once + usize::from(worker < count % at_once);
            spawn_local(async move {
                let mut clients = Vec::new();
                for _ in 0..share {
                    let stream = async |client: &mut Client| client.stream(Task::Hold).await;
                    let (mut client, _) = Client::served(port, stream).await?;
                    client.input = Vec::new();
                    clients.push(client);
                }
                Ok(clients)
            })
        })
        .collect();
    let mut clients = Vec::new();
    for task in tasks {
        clients.extend(task.await.map_err(io::Error::other)??);
    }
    Ok(clients)
}

/// One stream whose events are sent when asked for, `count` of them, each when the last has come.
pub(crate) async fn steps(
    client: &mut Client,
    count: u32,
    mut step: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut events = client.stream(Task::Step).await?;
    // The upstream may have sent the head before the stream was ready for steps.
    tokio::time::sleep(STEPS_PAUSE).await;
    for _ in 0..count {
        step()?;
        while events.data.len() < EVENT_BYTES {
            match client.tcp.read(&mut client.input).await? {
                0 => return Err(broken("a stream was broken off")),
                read => events.chunks.feed(&client.input[..read], &mut events.data),
            };
        }
        events.data.clear();
    }
    Ok(())
}
