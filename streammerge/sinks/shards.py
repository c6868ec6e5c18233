"""Writing weight files: staged under temporary names, written in pieces from any thread, synced, renamed.

A file is reserved in full before its first byte, so that a full disk is found early. Pieces are written past the page
cache where the file system can, straight from the memory they were made in; elsewhere through it, with pages written
back early and dropped. What lies in the base as it is wanted shares its blocks where the file system offers that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from streammerge.core import io
from streammerge.core.digests import block_count, block_digest, block_range
from streammerge.planning.memory import PIECE
from streammerge.planning.model import OutputShard
from streammerge.sinks.buffers import Origin, WriteBehind

BEHIND = 32 * 2**20
"""Bytes before a piece that are dropped from the page cache with it: by then they mostly are on the disk."""


class ShardFile:
    """One weight file in the making. Pieces may come in any order and from any thread, each exactly once."""

    def __init__(self, shard: OutputShard, staging: Path, *, direct: bool) -> None:
        self.shard, self.direct = shard, direct
        self.final = staging / shard.file
        self._temporary = str(staging / f"{shard.file}.{os.getpid()}.tmp")
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._missing = shard.size

    def write(self, offset: int, data: memoryview, origin: Origin | None) -> bool:
        """Write a piece, or let the file share the blocks of its origin; True if it was the last one."""
        fd, size = self._open(), min(len(data), self.shard.size - offset)
        if not (origin and io.clone(origin[0].fd, origin[1], fd, offset, size)):
            io.write_at(fd, self._temporary, offset, data, direct=self.direct)
        if not self.direct:
            first = max(0, offset - BEHIND)
            io.drop_cached(fd, first, offset + size - first)
        with self._lock:
            self._missing -= size
            return self._missing == 0

    def finish(self) -> None:
        """Make the file durable under its staged name."""
        fd = self._open()
        if self.direct:
            io.truncate(fd, self._temporary, self.shard.size)
        io.sync_file(fd, self._temporary)
        if not self.direct:
            io.drop_cached(fd, 0, self.shard.size)
        self.close()
        io.rename(self._temporary, self.final)

    def close(self) -> None:
        """Close the file, finished or not."""
        with self._lock:
            if self._fd is not None:
                io.close(self._fd)
                self._fd = None

    def _open(self) -> int:
        with self._lock:
            if self._fd is None:
                io.remove(self._temporary)
                self._fd = io.create(self._temporary, direct=self.direct)
                io.allocate(self._fd, self._temporary, self.shard.size)
            return self._fd


class ShardSink:
    """All weight files of an output. `wrote` is told of every piece, `finished` of every file, on the writing threads.
    `mode` is `auto`, `direct` or `buffered`; `io` says which of the last two it came to."""

    def __init__(
        self,
        shards: Sequence[OutputShard],
        staging: Path,
        mode: str,
        buffers: int,
        tell: tuple[Callable[[int], None], Callable[[OutputShard], None]],
    ) -> None:
        direct = mode == "direct" or (mode == "auto" and io.takes_direct_writes(staging))
        self.io = "direct" if direct else "buffered"
        self.files = [ShardFile(shard, staging, direct=direct) for shard in shards]
        self._behind = WriteBehind(buffers)
        self._wrote, self._finished = tell

    def lease(self) -> memoryview:
        """Memory for a piece. Raises what an earlier write failed with."""
        return self._behind.lease()

    def release(self, buffer: memoryview) -> None:
        """Take back what will not be written."""
        self._behind.release(buffer)

    def commit(self, number: int, offset: int, buffer: memoryview, size: int, origin: Origin | None) -> None:
        """Write the first `size` bytes of a leased buffer to file `number`, which may begin with those of `origin`."""
        file = self.files[number]
        length = size
        if file.direct:
            length = -(-size // io.ALIGNMENT) * io.ALIGNMENT
            buffer[size:length] = bytes(length - size)
        shares = origin if origin and not origin[1] % io.ALIGNMENT and not size % io.ALIGNMENT else None
        self._behind.submit(buffer, lambda: self._write(file, offset, buffer[:length], shares))

    def _write(self, file: ShardFile, offset: int, data: memoryview, origin: Origin | None) -> None:
        last = file.write(offset, data, origin)
        self._wrote(min(len(data), file.shard.size - offset))
        if last:
            file.finish()
            self._finished(file.shard)

    def finish(self) -> None:
        """Return when every file is durable under its staged name. Raises what a write failed with."""
        self._behind.finish()

    def close(self) -> None:
        """Stop writing, and close what is open."""
        self._behind.close()
        for file in self.files:
            file.close()


def copy_file(source: str, target: Path) -> tuple[int, list[str]]:
    """Copy a sidecar into the staging area, durably; its size and the digests of its blocks."""
    io.make_dirs(target.parent)
    io.remove(target)
    fd = io.open_input(source)
    try:
        out = io.create(target)
        try:
            size = io.state_of(fd, source).size
            ranges = [block_range(number, size) for number in range(block_count(size))]
            blocks = [block_digest(_copied(fd, source, out, target, *span)) for span in ranges]
            io.sync_file(out, str(target))
        finally:
            io.close(out)
    finally:
        io.close(fd)
    return size, blocks


def _copied(fd: int, source: str, out: int, target: Path, start: int, end: int) -> Iterator[bytearray]:
    for first in range(start, end, PIECE):
        data = io.read_at(fd, source, first, min(PIECE, end - first))
        io.write_at(out, str(target), first, data)
        yield data
