//! The page that holds the key: mapped for it alone, locked, read-only once filled, wiped on drop.

use std::io;

use memmap2::{Mmap, MmapMut};
use zeroize::Zeroize;

/// The size of the mapping, in bytes; the kernel rounds it up to whole pages.
pub(super) const BYTES: usize = 4096;

/// A read-only page.
pub(super) struct Page(Option<Mmap>);

impl Page {
    /// A page with what `fill` writes to it, and what it returns. If it fails, the page is wiped.
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

    /// The whole page.
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

/// Maps a zeroed page, locks it (mlock(2)) and excludes it from core dumps and forks (madvise(2)).
fn locked() -> io::Result<MmapMut> {
    let map = MmapMut::map_anon(BYTES)?;
    map.lock()?;
    // macOS writes no core dump here (`RLIMIT_CORE` is zero), and this program never forks.
    #[cfg(target_os = "linux")]
    for advice in [memmap2::Advice::DontDump, memmap2::Advice::DontFork] {
        map.advise(advice)?;
    }
    Ok(map)
}
