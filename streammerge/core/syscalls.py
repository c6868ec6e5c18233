"""System calls that Python does not offer as they are, and some that belong together. They raise OSError and nothing
else; `core/io.py` says what that means.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

_CLONE_RANGE = 0x4020940D
"""ioctl FICLONERANGE: two files share blocks from now on."""


def fallocate(fd: int, size: int) -> None:
    """Reserve `size` bytes: posix_fallocate of the C library writes to every block where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        if ctypes.get_errno() != errno.EINTR:  # Python calls again by itself, but not here
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def clone_range(source: int, source_offset: int, target: int, offset: int, size: int) -> None:
    """Let a range of one open file share the blocks of another's."""
    fcntl.ioctl(target, _CLONE_RANGE, struct.pack("qQQQ", source, source_offset, size, offset))


def new_memory(size: int) -> mmap.mmap:
    """Memory of its own pages, all zero."""
    return mmap.mmap(-1, size)


def redirect_to_nothing(fd: int) -> None:
    """Let further writes to a descriptor disappear: its reader has gone away."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)


@contextlib.contextmanager
def stand_in(path: str, start: bytes, size: int) -> Iterator[str]:
    """The path of a file in memory for one of `size` bytes that begins with `start`; its other bytes are zero and take
    no room. For libraries that map what they open: where the disk under a mapping fails, the process ends. `path`
    itself where the system gives no such file."""
    with contextlib.ExitStack() as stack:
        opened = path
        with contextlib.suppress(AttributeError, OSError):  # not Linux; no more descriptors, or a limit on files
            stream = stack.enter_context(os.fdopen(os.memfd_create("streammerge", os.MFD_CLOEXEC), "wb"))
            stream.write(start)
            stream.truncate(size)
            if os.path.exists(name := f"/proc/self/fd/{stream.fileno()}"):
                opened = name
        yield opened
