//! Ending in good order: one flag that every connection watches.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::watch;

use crate::server_info::ServerInfo;

/// Whether the program is to end. Clones are the same flag.
#[derive(Clone, Default)]
pub struct Stop {
    has_begun: watch::Sender<bool>,
    server_info: Rc<Cell<Option<ServerInfo>>>,
}

impl Stop {
    /// Removes this file when shutdown starts: it names a port that refuses connections from then on.
    pub fn remove_at_start(&self, file: ServerInfo) {
        self.server_info.set(Some(file));
    }

    /// Begins the end. Again is nothing.
    pub fn begin(&self) {
        drop(self.server_info.take());
        self.has_begun.send_replace(true);
    }

    /// Whether it has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        *self.has_begun.borrow()
    }

    /// Returns once it has begun.
    pub async fn begun(&self) {
        // An error means that nobody can begin it any more, and `self` can.
        let _ = self.has_begun.subscribe().wait_for(|begun| *begun).await;
    }
}
