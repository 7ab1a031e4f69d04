//! Reads and searches the whole memory of another process through /proc.

use super::{Proxy, linux::process};
use procfs::process::{MMPermissions, MMapPath, MemoryMap};
use std::{io::BufRead, os::unix::fs::FileExt};

pub(crate) struct Memory(Vec<(MemoryMap, Vec<u8>)>);

impl Memory {
    /// Reads every readable mapping. Panics if reading one of them fails.
    ///
    /// The process must be frozen: a thread that exits would unmap its stack during the read.
    pub(crate) fn read(proxy: &Proxy) -> Self {
        let maps = process(proxy).smaps().unwrap();
        let memory = process(proxy).mem().unwrap();
        let read = |map: MemoryMap| {
            let mut bytes = vec![0; usize::try_from(map.address.1 - map.address.0).unwrap()];
            match memory.read_exact_at(&mut bytes, map.address.0) {
                Ok(()) => Some((map, bytes)),
                // Root can read most mappings without read permission; the others have no pages.
                Err(_) if !map.perms.contains(MMPermissions::READ) => None,
                Err(error) => match &map.pathname {
                    // Pages of the kernel with clock data.
                    MMapPath::Vvar | MMapPath::Vsyscall => None,
                    MMapPath::Other(name) if name.starts_with("vvar") => None,
                    _ => panic!("{error}: {map:?}"),
                },
            }
        };
        Self(maps.into_iter().filter_map(read).collect())
    }

    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// All occurrences of these bytes: the mapping, and the bytes around.
    pub(crate) fn find(&self, needle: &[u8]) -> Vec<(&MemoryMap, String)> {
        let mut matches = Vec::new();
        for (map, bytes) in &self.0 {
            let (mut rest, mut at) = (bytes.as_slice(), 0);
            // Precompiled in std, so it is fast in debug builds, too.
            while let Ok(skipped @ 1..) = rest.skip_until(needle[0]) {
                at += skipped;
                if bytes[at - 1..].starts_with(needle) {
                    let around = &bytes[at.saturating_sub(80)..bytes.len().min(at + 120)];
                    matches.push((map, around.escape_ascii().to_string()));
                }
            }
        }
        matches
    }
}
