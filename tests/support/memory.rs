//! All of another process's memory, over procfs.

use super::{Proxy, linux::process};
use procfs::process::{MMPermissions, MMapPath, MemoryMap};
use std::{io::BufRead, os::unix::fs::FileExt};

pub(crate) struct Memory(Vec<(MemoryMap, Vec<u8>)>);

impl Memory {
    /// Reads every mapping that can be read. One that says it can, and can't, is a failure.
    ///
    /// The process must be frozen: a thread that ends meanwhile would take its stack from under the reader.
    pub(crate) fn read(proxy: &Proxy) -> Self {
        let maps = process(proxy).smaps().unwrap();
        let memory = process(proxy).mem().unwrap();
        let read = |map: MemoryMap| {
            let mut bytes = vec![0; usize::try_from(map.address.1 - map.address.0).unwrap()];
            match memory.read_exact_at(&mut bytes, map.address.0) {
                Ok(()) => Some((map, bytes)),
                // Root may read what the process itself can't; where not even that works, there is nothing.
                Err(_) if !map.perms.contains(MMPermissions::READ) => None,
                Err(error) => match &map.pathname {
                    // The kernel's own pages, which hold its clock.
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

    /// Where these bytes are: each time the mapping, and what is around them.
    pub(crate) fn find(&self, needle: &[u8]) -> Vec<(&MemoryMap, String)> {
        let mut places = Vec::new();
        for (map, bytes) in &self.0 {
            let (mut rest, mut at) = (bytes.as_slice(), 0);
            // Of all ways to look for a byte, std has compiled this one to be quick in a debug build, too.
            while let Ok(skipped @ 1..) = rest.skip_until(needle[0]) {
                at += skipped;
                if bytes[at - 1..].starts_with(needle) {
                    let around = &bytes[at.saturating_sub(80)..bytes.len().min(at + 120)];
                    places.push((map, around.escape_ascii().to_string()));
                }
            }
        }
        places
    }
}
