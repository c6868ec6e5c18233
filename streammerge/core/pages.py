"""The page cache as seen from outside: filling it ahead of time, looking whether something is in it, giving it back.

Nothing depends on what these say or do but time.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os

from streammerge.core import io

FOLIO = 2**21
"""Bytes, aligned, that Linux maps at most at once when one page of a file is touched: a huge page of the page cache."""


def cache(fd: int, path: str, offset: int, size: int) -> int:
    """Read up to `size` bytes into the page cache and no further; how many, 0 at the end of the file. Python's lock is
    not held meanwhile, however long it takes."""
    with io.reading(path, "read ahead"):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.sendfile(nowhere, fd, offset, size)
        finally:
            os.close(nowhere)


def is_cached(path: str | os.PathLike[str]) -> bool:
    """Whether the first page of a file is in the page cache; True where that cannot be told."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        mapping = mmap.mmap(fd, 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        found = (ctypes.c_ubyte * 1)(1)
        page = ctypes.c_char.from_buffer(mapping)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(page)), ctypes.c_size_t(1), found)
        return bool(found[0] & 1)
    except (OSError, ValueError):
        return True
    finally:
        os.close(fd)


def give_back(mapping: mmap.mmap, start: int, end: int) -> None:
    """Drop the pages of [start, end) from this process: they stay in the page cache, not in our memory.

    With all of the FOLIO around both ends: one touch may have mapped as much, and who still reads there faults it in
    again.
    """
    first, last = start // FOLIO * FOLIO, min(-(-end // FOLIO) * FOLIO, -(-len(mapping) // io.PAGE) * io.PAGE)
    if last > first:
        mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def drop(fd: int, offset: int, size: int) -> None:
    """Start writing bytes of a file back to the disk, and drop from the page cache what is already there."""
    with contextlib.suppress(OSError):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
