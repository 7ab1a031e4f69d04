//! Pooled upstream connections.

use std::{cell::RefCell, collections::VecDeque, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::connection::UpstreamConnection;

/// The most pooled connections. There are never more than were in use at once.
const MAX_IDLE: usize = 1024;

/// How long a connection stays pooled. Servers close theirs after a minute or more.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Idle connections in the order of their last use, and since when they are idle.
pub(super) struct Pool<T = UpstreamConnection>(RefCell<VecDeque<(T, Instant)>>);

impl<T> Pool<T> {
    pub(super) fn new() -> Self {
        Self(RefCell::default())
    }

    /// Takes the connection used last.
    pub(super) fn acquire(&self) -> Option<T> {
        self.0.borrow_mut().pop_back().map(|(idle, _)| idle)
    }

    /// Adds a connection, unless there are too many.
    pub(super) fn release(&self, idle: T) {
        let mut all = self.0.borrow_mut();
        if all.len() < MAX_IDLE {
            all.push_back((idle, Instant::now()));
        }
    }

    /// Drops each connection when it has expired. Never returns.
    pub(super) async fn evict_expired(&self) {
        loop {
            let oldest = self.0.borrow().front().map(|(_, since)| *since);
            // If the pool is empty, nothing in it will expire before a connection that is released now would.
            sleep_until(oldest.unwrap_or_else(Instant::now) + IDLE_TIMEOUT).await;
            let mut all = self.0.borrow_mut();
            all.retain(|(_, since)| since.elapsed() < IDLE_TIMEOUT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn last_used_is_acquired_first_and_each_expires_after_90_s() {
        let pool = Pool::new();
        let sweep = async {
            pool.evict_expired().await;
        };
        let story = async {
            pool.release(1);
            tokio::time::sleep(Duration::from_secs(60)).await;
            pool.release(2);
            assert_eq!(pool.acquire(), Some(2));
            pool.release(2);
            let milliseconds = Duration::from_millis;
            tokio::time::sleep(milliseconds(29_999)).await;
            assert_eq!(pool.0.borrow().len(), 2);
            tokio::time::sleep(milliseconds(2)).await;
            assert_eq!(pool.0.borrow().len(), 1, "the first is 90 s old");
            tokio::time::sleep(milliseconds(60_000)).await;
            assert_eq!(pool.acquire(), None, "and so is the second");
        };
        tokio::select! { () = sweep => unreachable!(), () = story => {} }
    }

    #[test]
    fn at_most_1024_connections_are_pooled() {
        let pool = Pool::new();
        (0..2000).for_each(|number| pool.release(number));
        assert_eq!(pool.0.borrow().len(), 1024);
        assert_eq!(pool.acquire(), Some(1023));
    }
}
