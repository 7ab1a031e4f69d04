//! Ending in good order: one flag that every connection watches.

use tokio::sync::watch;

/// Whether the program is to end. Clones are the same flag.
#[derive(Clone, Default)]
pub struct Stop(watch::Sender<bool>);

impl Stop {
    /// Begins the end. Again is nothing.
    pub fn begin(&self) {
        self.0.send_replace(true);
    }

    /// Whether it has begun.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once it has begun.
    pub async fn begun(&self) {
        // An error means that nobody can begin it any more, and `self` can.
        let _ = self.0.subscribe().wait_for(|begun| *begun).await;
    }
}
