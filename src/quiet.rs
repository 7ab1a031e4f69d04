//! A waker that doesn't wake the task that is being polled.
//!
//! A link's parts (hyper's connection, the channels to its request and answer) are polled together,
//! and wake each other while they are: through the event loop, each such wake would cost another poll
//! of the whole task. Here it is only noted, and whoever polls looks again before giving up.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// How often they are looked at again in one poll. Some wakes mean "go on later, let others have their
/// turn" (tokio's budget, hyper's own), which must reach the event loop in the end.
const MAX_ROUNDS: usize = 3;

/// Shared by the waker that is handed out and the one who polls.
struct Shared {
    task: Mutex<Waker>,
    is_polling: AtomicBool,
    is_woken: AtomicBool,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is_polling.load(Ordering::Relaxed) {
            self.is_woken.store(true, Ordering::Relaxed);
        } else {
            self.task
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .wake_by_ref();
        }
    }
}

/// Polls things that wake each other.
pub struct Quiet {
    shared: Arc<Shared>,
    waker: Waker,
}

impl Default for Quiet {
    fn default() -> Self {
        let shared = Arc::new(Shared {
            task: Mutex::new(Waker::noop().clone()),
            is_polling: AtomicBool::new(false),
            is_woken: AtomicBool::new(false),
        });
        Self {
            waker: Waker::from(Arc::clone(&shared)),
            shared,
        }
    }
}

impl Quiet {
    /// Calls `poll` until it is ready, or pending with nothing having been woken meanwhile.
    ///
    /// Where it is ready, wakes during the last call are forgotten: the caller must poll again for
    /// more, as everyone does who takes items until there are none. Everything runs on one thread, so
    /// no wake comes from elsewhere during a call.
    pub fn poll<T>(
        &self,
        cx: &Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        let shared = &*self.shared;
        shared
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(cx.waker());
        shared.is_polling.store(true, Ordering::Relaxed);
        let mut quiet = Context::from_waker(&self.waker);
        for _ in 0..MAX_ROUNDS {
            shared.is_woken.store(false, Ordering::Relaxed);
            let outcome = poll(&mut quiet);
            if outcome.is_ready() || !shared.is_woken.load(Ordering::Relaxed) {
                shared.is_polling.store(false, Ordering::Relaxed);
                return outcome;
            }
        }
        shared.is_polling.store(false, Ordering::Relaxed);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
