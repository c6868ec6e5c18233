"""A FUSE file system that hands a directory through, and fails when it is told to.

The server is a fork of the campaign, which tells it by shared memory what the n-th call of one operation is to meet:
an error, half of the bytes, or a file that has become shorter. It needs mfusepy, libfuse 3 and the right to mount.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.mounts import Refused, needs, unmount

SHARED = 4096
OPERATIONS = (
    "getattr", "open", "create", "read", "write", "rename", "fallocate", "flush", "release", "fsync", "fsyncdir",
    "opendir", "mkdir", "rmdir", "unlink",
)  # fmt: skip
"""What a fault can strike."""
COUNTS = struct.Struct(f"{len(OPERATIONS)}Q")
PATIENCE = 10.0
"""Seconds for the server to come up."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What the `at`-th call of an operation meets, and all that follow if it is `sticky`: an error if there is an
    `errno`, else half of the bytes, or a file cut in half. Nothing meets one whose `at` is 0."""

    operation: str = ""
    errno: int = 0
    action: str = ""
    at: int = 0
    sticky: bool = False


class Control:
    """The memory by which a campaign tells a server of a fault, and learns how often its operation was called."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, SHARED)
        self._text, self._fault = b"", Fault()

    def set(self, fault: Fault) -> None:
        """From now on this, and nothing else; the counts begin again."""
        text = json.dumps(asdict(fault)).encode()
        self._shared[:] = bytes(COUNTS.size) + text + bytes(SHARED - COUNTS.size - len(text))

    def counts(self) -> dict[str, int]:
        """Calls of every operation so far."""
        return dict(zip(OPERATIONS, COUNTS.unpack(self._shared[: COUNTS.size]), strict=True))

    def met(self, operation: str) -> Fault | None:
        """In the server: what a call meets now, if anything."""
        text = self._shared[COUNTS.size :].rstrip(b"\0")
        if text != self._text:
            self._text, self._fault = text, Fault(**json.loads(text)) if text else Fault()
        counts = self.counts()
        counts[operation] += 1
        self._shared[: COUNTS.size] = COUNTS.pack(*counts.values())
        at, count = self._fault.at, counts[operation]
        strikes = operation == self._fault.operation and (count == at or (self._fault.sticky and count > at > 0))
        return self._fault if strikes else None


@contextlib.contextmanager
def served(root: Path, target: Path, *, direct: bool = False) -> Iterator[Control]:
    """The directory `root`, handed through at `target`; with `direct`, every read of a process reaches the server."""
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        raise Refused(f"mfusepy cannot be loaded: {error}") from None
    needs("fusermount3")
    target.mkdir(parents=True, exist_ok=True)
    control = Control()
    pid = os.fork()
    if pid == 0:
        _serve(root, target, control, direct=direct)
    try:
        until = time.monotonic() + PATIENCE
        while not os.path.ismount(target):
            if time.monotonic() > until or os.waitpid(pid, os.WNOHANG)[0]:
                raise Refused("no FUSE file system could be mounted")
            time.sleep(0.01)
        yield control
    finally:
        if os.path.ismount(target):
            unmount(target)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def _serve(root: Path, target: Path, control: Control, *, direct: bool) -> None:
    """The server, until it is unmounted."""
    import mfusepy

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # it complains that somebody else has unmounted it
    try:
        mfusepy.FUSE(
            Passthrough(root, control), str(target), foreground=True, nothreads=True, direct_io=direct,
            attr_timeout=0, entry_timeout=0,
        )  # fmt: skip
    finally:
        os._exit(0)


class Passthrough:
    """The operations of a server, as mfusepy calls them: on the same path below another root, if no fault strikes."""

    def __init__(self, root: Path, control: Control) -> None:
        self._root, self._control = root, control

    def _meets(self, operation: str) -> Fault | None:
        fault = self._control.met(operation)
        if fault and fault.errno:
            raise OSError(fault.errno, os.strerror(fault.errno))
        return fault

    def _at(self, path: str) -> str:
        return f"{self._root}{path}"

    # --- what is there ---
    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        self._meets("getattr")
        return _fields(os.lstat(self._at(path)), "st_")

    def statfs(self, path: str) -> dict[str, Any]:
        return _fields(os.statvfs(self._at(path)), "f_")

    def opendir(self, path: str) -> int:
        self._meets("opendir")
        return 0

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._at(path))]

    # --- files ---
    def open(self, path: str, flags: int) -> int:
        self._meets("open")
        return os.open(self._at(path), flags & ~(os.O_DIRECT | os.O_APPEND))

    def create(self, path: str, mode: int, flags: int = os.O_RDWR) -> int:
        self._meets("create")
        return os.open(self._at(path), flags & ~(os.O_DIRECT | os.O_APPEND) | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        fault = self._meets("read")
        if fault and fault.action == "shrink":
            os.truncate(self._at(path), os.stat(self._at(path)).st_size // 2)
        return os.pread(fh, max(1, size // 2) if fault and fault.action == "half" else size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        half = self._meets("write") is not None and len(data) > 1
        return os.pwrite(fh, data[: len(data) // 2] if half else data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._at(path), length)

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        self._meets("fallocate")
        os.posix_fallocate(fh, offset, size)
        return 0

    def flush(self, path: str, fh: int) -> int:
        self._meets("flush")
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        self._meets("fsync")
        os.fsync(fh)

    def release(self, path: str, fh: int) -> None:
        self._meets("release")
        os.close(fh)

    # --- directories ---
    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._meets("fsyncdir")
        return 0

    def mkdir(self, path: str, mode: int) -> None:
        self._meets("mkdir")
        os.mkdir(self._at(path), mode)

    def rmdir(self, path: str) -> None:
        self._meets("rmdir")
        os.rmdir(self._at(path))

    def unlink(self, path: str) -> None:
        self._meets("unlink")
        os.unlink(self._at(path))

    def rename(self, old: str, new: str) -> None:
        self._meets("rename")
        os.rename(self._at(old), self._at(new))


def _fields(found: os.stat_result | os.statvfs_result, prefix: str) -> dict[str, Any]:
    return {name: getattr(found, name) for name in dir(found) if name.startswith(prefix)}
