//! The memory that holds the key: mapped for it alone, locked, read-only once it is filled, and wiped at the end.

use std::io;

use memmap2::{Mmap, MmapMut};
use zeroize::Zeroize;

/// How much is mapped, in bytes; the kernel rounds it up to a whole page.
const BYTES: usize = 4096;

/// A page that is being filled. Wiped if it is dropped before it is sealed.
pub(super) struct Page(Option<MmapMut>);

impl Page {
    /// Maps a zeroed page, locks it (mlock(2)) and keeps it out of dumps and forks (madvise(2)).
    pub(super) fn map() -> io::Result<Self> {
        let map = MmapMut::map_anon(BYTES)?;
        map.lock()?;
        // macOS dumps no core here (`RLIMIT_CORE` is zero), and this program never forks.
        #[cfg(target_os = "linux")]
        for advice in [memmap2::Advice::DontDump, memmap2::Advice::DontFork] {
            map.advise(advice)?;
        }
        Ok(Self(Some(map)))
    }

    /// All of it.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.0.as_deref_mut().unwrap_or_default()
    }

    /// Makes it read-only.
    pub(super) fn seal(mut self) -> io::Result<Sealed> {
        let map = self.0.take().ok_or(io::ErrorKind::NotFound)?;
        Ok(Sealed(Some(map.make_read_only()?)))
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.bytes().zeroize();
    }
}

/// A page that holds its content until it is dropped, which wipes it.
pub(super) struct Sealed(Option<Mmap>);

impl Sealed {
    /// All of it.
    pub(super) fn bytes(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        if let Some(Ok(mut map)) = self.0.take().map(Mmap::make_mut) {
            map.zeroize();
        }
    }
}
