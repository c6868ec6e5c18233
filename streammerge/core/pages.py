"""The page cache as seen from outside: filling it ahead of time, and looking whether something is in it.

Nothing depends on what these say or do but time.
"""

from __future__ import annotations

import os

from streammerge.core import io


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
    """Whether the first bytes of a file are in the page cache; True where that cannot be told."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) >= 0
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(fd)
