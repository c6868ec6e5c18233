"""Locks between processes: they save work, and nothing else depends on them, since some file systems have none."""

from __future__ import annotations

import errno
import fcntl
import os

from streammerge.core import io


def lock(path: str | os.PathLike[str]) -> int | None:
    """A descriptor that holds the lock of `path` until it is closed; None if another process holds it. Where the file
    system has no locks, everybody gets one."""
    fd = io.open_lock(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            io.close(fd)
            return None
    return fd
