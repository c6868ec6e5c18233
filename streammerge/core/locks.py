"""Locks between processes: they save work, and nothing else depends on them, since some file systems have none."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass

from streammerge.core import io
from streammerge.core.errors import InputError, InputMissingError

TRIES = 5
"""Locks that are taken, one after the other, of a file that others keep removing."""


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
    for _ in range(TRIES):
        fd = io.open_lock(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                io.close(fd)
                return None
            return Lock(fd, alone=False)
        if _is_at(fd, path):
            return Lock(fd, alone=True)
        io.close(fd)
    return None


def _is_at(fd: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file still is what lies at `path`: the lock of one that its holder has removed since keeps
    nobody out."""
    try:
        here, there = io.state_of(fd, str(path)), io.path_state(path)
    except InputMissingError:
        return False
    except InputError:
        io.close(fd)
        raise
    return (here.device, here.inode) == (there.device, there.inode)
