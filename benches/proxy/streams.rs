//! Streams: followed for their delays, held for their memory, or moved step by step.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::task::{JoinHandle, spawn_local};

use crate::load::{Client, broken};
use crate::wire::{self, EVENT_BYTES, EVENT_STAMP_AT, Task};

/// How long a stream is given before it is asked for events.
const STEPS_PAUSE: Duration = Duration::from_millis(200);

/// How often streams that are to begin are looked at.
const BEGIN_POLL: Duration = Duration::from_millis(5);

/// Nanoseconds from an event's sending to its receipt, while someone wants to know.
#[derive(Default)]
pub(crate) struct Delays {
    /// How many streams have had an event.
    begun: Cell<usize>,
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

/// Follows `count` streams until the tasks are aborted; gives those when every stream has had an
/// event, so that no connection is made while delays are measured.
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
            let mut has_begun = false;
            loop {
                if !has_begun && events.data.len() >= EVENT_BYTES {
                    has_begun = true;
                    delays.begun.set(delays.begun.get() + 1);
                }
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
    // A stream that ends is an error, which whoever has its task is told.
    while delays.begun.get() < count && !tasks.iter().any(JoinHandle::is_finished) {
        tokio::time::sleep(BEGIN_POLL).await;
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
