//! Links between exchanges, kept for the next.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::connection::UpstreamConnection;

/// How many idle links are kept at the most; there are never more than were in use at once.
const MAX_IDLE: usize = 1024;

/// How long a link is kept without use. Servers close theirs after a minute or more.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Idle things, the one used last at the end, with the time since when they are.
pub(super) struct Pool<T = UpstreamConnection> {
    idle: RefCell<VecDeque<(T, Instant)>>,
    /// Tells [`Pool::evict_expired`] that there is one again.
    filled: Notify,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self {
            idle: RefCell::default(),
            filled: Notify::new(),
        }
    }
}

impl<T> Pool<T> {
    /// Takes the one that was used last.
    pub(super) fn acquire(&self) -> Option<T> {
        self.idle.borrow_mut().pop_back().map(|(idle, _)| idle)
    }

    /// Keeps one, unless there are too many.
    pub(super) fn release(&self, idle: T) {
        let mut all = self.idle.borrow_mut();
        if all.len() < MAX_IDLE {
            all.push_back((idle, Instant::now()));
            self.filled.notify_one();
        }
    }

    /// Drops each when it is too old. Never ends.
    pub(super) async fn evict_expired(&self) {
        loop {
            let oldest = self.idle.borrow().front().map(|(_, since)| *since);
            match oldest {
                Some(since) => sleep_until(since + IDLE_TIMEOUT).await,
                None => self.filled.notified().await,
            }
            let is_old = |(_, since): &(T, Instant)| since.elapsed() >= IDLE_TIMEOUT;
            let mut all = self.idle.borrow_mut();
            while all.front().is_some_and(is_old) {
                all.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_last_used_is_taken_first_and_each_is_dropped_after_90_seconds() {
        let pool = Pool::default();
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
            assert_eq!(pool.idle.borrow().len(), 2);
            tokio::time::sleep(milliseconds(2)).await;
            assert_eq!(pool.idle.borrow().len(), 1, "the first is 90 s old");
            tokio::time::sleep(milliseconds(60_000)).await;
            assert_eq!(pool.acquire(), None, "and so is the second");
        };
        tokio::select! { () = sweep => unreachable!(), () = story => {} }
    }

    #[test]
    fn at_most_1024_are_kept() {
        let pool = Pool::default();
        (0..2000).for_each(|number| pool.release(number));
        assert_eq!(pool.idle.borrow().len(), 1024);
        assert_eq!(pool.acquire(), Some(1023));
    }
}
