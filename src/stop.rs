//! Ending in good order: one flag that every connection watches.

use std::cell::Cell;

use tokio::sync::Notify;

/// Whether the program is to end, and who waits for that.
#[derive(Default)]
pub struct Stop {
    begun: Cell<bool>,
    notify: Notify,
}

impl Stop {
    /// Begins the end. Again is nothing.
    pub fn begin(&self) {
        self.begun.set(true);
        self.notify.notify_waiters();
    }

    /// Whether it has begun.
    pub fn has_begun(&self) -> bool {
        self.begun.get()
    }

    /// Returns once it has begun.
    pub async fn begun(&self) {
        while !self.begun.get() {
            self.notify.notified().await;
        }
    }
}
