"""Writing weight files: staged under temporary names, written in blocks from any thread, synced, renamed.

A file is reserved in full before its first byte, so that a full disk is found early. Digests are taken of the bytes on
their way out, block by block.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import xxhash

from streammerge.core import io
from streammerge.core.digests import block_count, block_digest, block_range, file_digest
from streammerge.planning.memory import PIECE
from streammerge.planning.model import OutputShard


class ShardFile:
    """One weight file in the making. Blocks may come in any order and from any thread, each exactly once."""

    def __init__(self, shard: OutputShard, staging: Path) -> None:
        self.shard = shard
        self.final = staging / shard.file
        self._temporary = staging / f"{shard.file}.{os.getpid()}.tmp"
        self._lock = threading.Lock()
        self._fd: int | None = None
        self.blocks: list[str] = [""] * block_count(shard.size)

    def write_block(self, number: int, offset: int, pieces: Iterable[memoryview], wrote: Callable[[int], None]) -> bool:
        """Write one block from `offset` on, telling `wrote` of every piece; True if it was the file's last."""
        fd = self._open()
        digest = xxhash.xxh3_128()
        start = offset
        for piece in pieces:
            io.write_at(fd, str(self._temporary), offset, piece)
            digest.update(piece)
            offset += len(piece)
            wrote(len(piece))
        io.drop_cached(fd, start, offset - start)
        with self._lock:
            self.blocks[number] = digest.hexdigest()
            return all(self.blocks)

    def finish(self) -> None:
        """Make the file durable under its staged name."""
        fd = self._open()
        io.sync_file(fd, str(self._temporary))
        io.drop_cached(fd, 0, self.shard.size)
        self.close()
        io.rename(self._temporary, self.final)

    def close(self) -> None:
        """Close the file, finished or not."""
        with self._lock:
            if self._fd is not None:
                io.close(self._fd)
                self._fd = None

    def digest(self) -> str:
        """The finished file's digest."""
        return file_digest(self.blocks)

    def _open(self) -> int:
        with self._lock:
            if self._fd is None:
                io.remove(self._temporary)
                self._fd = io.create(self._temporary)
                io.allocate(self._fd, str(self._temporary), self.shard.size)
            return self._fd


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
