"""File systems of a campaign's own: loop disks that can lose their power, small ones in memory, bind mounts.

They are mounted in a mount namespace that ends with the process, so that none of them outlives a campaign, however it
ends. What this machine does not permit is a Refused with the reason, which a campaign prints and a test skips with.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

MIB = 2**20
SHUTDOWN = 0x8004587D
"""ioctl FS_IOC_SHUTDOWN: from now on the file system takes nothing and writes nothing, as if the power had gone."""
NO_LOG_FLUSH = 2
"""Its flag for not even writing the log of changes that are under way."""
NEW_MOUNTS, RECURSIVE, PRIVATE = 0x20000, 0x4000, 0x40000
"""CLONE_NEWNS, MS_REC and MS_PRIVATE of Linux."""
FORMATS = {
    "ext4": (("mkfs.ext4", "-q", "-F", "-m", "0", "-I", "256"), 64 * MIB),
    "xfs": (("mkfs.xfs", "-q", "-f", "-m", "reflink=1"), 300 * MIB),
}
"""How each kind is made, and its least size here: XFS is made on no less, the time of ext4 is in its inodes of 256."""
SYSTEM = os.pathsep.join(("/usr/sbin", "/sbin", "/usr/bin", "/bin"))


class Refused(Exception):
    """Why a campaign cannot be run on this machine."""


def needs(*tools: str) -> None:
    """Raise Refused where one of `tools` is not installed."""
    for tool in tools:
        if not tool_path(tool):
            raise Refused(f"`{tool}` is not installed")


def tool_path(tool: str) -> str | None:
    """Where a tool of the system is, which may not be on the path of an ordinary user."""
    return shutil.which(tool) or shutil.which(tool, path=SYSTEM)


def keep_mounts_private() -> None:
    """Let what this process and its children mount be seen by nobody else, and end with them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS) or libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None):
        raise Refused(f"no mount namespace can be made: {os.strerror(ctypes.get_errno())}")


def do(*command: str | Path) -> None:
    """Run a tool of the system; Refused with what it said where it fails."""
    named = [tool_path(str(command[0])) or command[0], *command[1:]]
    done = subprocess.run(named, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"`{' '.join(map(str, command))}` failed: {(done.stderr or done.stdout).strip()}")


@contextlib.contextmanager
def mounted(target: Path, *options: str | Path) -> Iterator[Path]:
    """`mount OPTIONS TARGET`, undone afterwards."""
    target.mkdir(parents=True, exist_ok=True)
    do("mount", *options, target)
    try:
        yield target
    finally:
        unmount(target)


def memory_disk(target: Path, size: int, *, files: int = 0) -> contextlib.AbstractContextManager[Path]:
    """A tmpfs of `size` bytes, and of at most so many `files` if that is not 0."""
    return mounted(target, "-t", "tmpfs", "-o", f"size={size},nr_inodes={files}", "tmpfs")


def bound(source: Path, target: Path) -> contextlib.AbstractContextManager[Path]:
    """The directory `source` seen at `target` too, as a mount of its own."""
    return mounted(target, "--bind", source)


def unmount(target: Path) -> None:
    """Unmount, and where somebody still holds a file there, as soon as nobody does."""
    try:
        do("umount", target)
    except Refused:
        do("umount", "--lazy", target)


class LoopDisk:
    """A file system in a file, mounted at `target` within `with`, which can lose its power and be mounted again."""

    def __init__(self, kind: str, image: Path, target: Path, size: int = 0) -> None:
        command, least = FORMATS[kind]
        needs(command[0])
        self.image, self.target, self._mounted = image, target, False
        with image.open("wb") as stream:
            stream.truncate(max(size, least) if kind == "xfs" else size or least)
        do(*command, image)
        target.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> LoopDisk:
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        if self._mounted:
            self.unmount()
        self.image.unlink()

    def mount(self) -> None:
        """Let it be there, after it has gone through its log if it was cut off."""
        do("mount", "-o", "loop", self.image, self.target)
        self._mounted = True

    def unmount(self) -> None:
        """Let it not be there."""
        unmount(self.target)
        self._mounted = False


def shut_down(target: Path) -> None:
    """Take its power from the file system that `target` lies on: what it did not make durable before is lost."""
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
    os.close(fd)


def write_back(target: Path) -> None:
    """Make everything durable that was written to the file system of `target`."""
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(fd)
