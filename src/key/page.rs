//! The memory that holds the key: mapped for it alone, locked, read-only once it is filled, and wiped at the end.

use std::io;

use memmap2::{Mmap, MmapMut};
use zeroize::Zeroize;

/// How much is mapped, in bytes; the kernel rounds it up to a whole page.
pub(super) const BYTES: usize = 4096;

/// A read-only page. Dropping it wipes it.
pub(super) struct Page(Option<Mmap>);

impl Page {
    /// A page with what `fill` puts there, and what it says of that.
    ///
    /// # Errors
    ///
    /// That of `fill`, after the page is wiped, or a sentence on what the system refused.
    pub(super) fn filled<T>(
        fill: impl FnOnce(&mut [u8]) -> Result<T, String>,
    ) -> Result<(Self, T), String> {
        let mut map = locked().map_err(|error| {
            format!("cannot lock a page of memory for the key: {error}; raise RLIMIT_MEMLOCK")
        })?;
        let outcome = fill(&mut map).inspect_err(|_| map.zeroize())?;
        match map.make_read_only() {
            Ok(map) => Ok((Self(Some(map)), outcome)),
            Err(error) => Err(format!("cannot make the key's page read-only: {error}")),
        }
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if let Some(Ok(mut map)) = self.0.take().map(Mmap::make_mut) {
            map.zeroize();
        }
    }
}

/// Maps a zeroed page, locks it (mlock(2)) and keeps it out of dumps and forks (madvise(2)).
fn locked() -> io::Result<MmapMut> {
    let map = MmapMut::map_anon(BYTES)?;
    map.lock()?;
    // macOS dumps no core here (`RLIMIT_CORE` is zero), and this program never forks.
    #[cfg(target_os = "linux")]
    for advice in [memmap2::Advice::DontDump, memmap2::Advice::DontFork] {
        map.advise(advice)?;
    }
    Ok(map)
}
