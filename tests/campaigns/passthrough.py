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
from collections.abc import Callable, Iterator
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
            _operations(root, control), str(target), foreground=True, nothreads=True, direct_io=direct,
            attr_timeout=0, entry_timeout=0,
        )  # fmt: skip
    finally:
        os._exit(0)


def _operations(root: Path, control: Control) -> Any:
    """The operations of a server: mfusepy is there only where it was asked for."""
    from mfusepy import FuseOSError, Operations

    def meets(operation: str) -> Fault | None:
        fault = control.met(operation)
        if fault and fault.errno:
            raise FuseOSError(fault.errno)
        return fault

    def plain(operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def handled(_: object, path: str, *arguments: Any) -> Any:
            meets(operation)
            return call(f"{root}{path}", *arguments)

        return handled

    class Passthrough(Operations):
        """What has a body of its own; the rest is below."""

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            meets("getattr")
            found = os.lstat(f"{root}{path}")
            return {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}

        def open(self, path: str, flags: int) -> int:
            meets("open")
            return os.open(f"{root}{path}", flags & ~(os.O_DIRECT | os.O_APPEND))

        def create(self, path: str, mode: int, flags: int = os.O_RDWR | os.O_CREAT) -> int:
            meets("create")
            return os.open(f"{root}{path}", flags & ~(os.O_DIRECT | os.O_APPEND) | os.O_CREAT, mode)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            fault = meets("read")
            if fault and fault.action == "shrink":
                os.truncate(f"{root}{path}", os.stat(f"{root}{path}").st_size // 2)
            return os.pread(fh, max(1, size // 2) if fault and fault.action == "half" else size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            half = meets("write") is not None and len(data) > 1
            return os.pwrite(fh, data[: len(data) // 2] if half else data, offset)

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *os.listdir(f"{root}{path}")]

        def statfs(self, path: str) -> dict[str, int]:
            found = os.statvfs(f"{root}{path}")
            return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

        def rename(self, old: str, new: str) -> None:
            meets("rename")
            os.rename(f"{root}{old}", f"{root}{new}")

        def truncate(self, path: str, length: int, fh: int | None = None) -> None:
            os.truncate(f"{root}{path}", length)

        def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
            meets("fallocate")
            os.posix_fallocate(fh, offset, size)
            return 0

    calls: dict[str, Callable[..., Any]] = {
        "flush": lambda path, fh: 0,
        "release": lambda path, fh: os.close(fh),
        "fsync": lambda path, datasync, fh: os.fsync(fh),
        "fsyncdir": lambda path, datasync, fh: 0,
        "opendir": lambda path: 0,
        "mkdir": os.mkdir,
        "rmdir": os.rmdir,
        "unlink": os.unlink,
    }
    for name, call in calls.items():
        setattr(Passthrough, name, plain(name, call))
    return Passthrough()
