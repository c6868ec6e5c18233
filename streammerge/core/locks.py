"""Locks between processes: they save work, and nothing else depends on them, since some file systems have none."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass

from streammerge.core import io


@dataclass(frozen=True, slots=True)
class Lock:
    """The lock of a file, until it is closed. `alone` is False where the file system has no locks, and everybody gets
    one."""

    fd: int
    alone: bool

    def close(self) -> None:
        """Let others have it."""
        io.close(self.fd)


def lock(path: str | os.PathLike[str]) -> Lock | None:
    """The lock of `path`, a file that is made where it is not there; None if another process holds it."""
    fd = io.open_lock(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            io.close(fd)
            return None
        return Lock(fd, alone=False)
    return Lock(fd, alone=True)
