"""Writing weight files: staged under temporary names, written in pieces from any thread, synced, renamed.

A file is reserved in full before its first byte, so that a full disk is found early. Pieces are written past the page
cache where the file system can, straight from the memory they were made in; elsewhere through it, with pages written
back early and dropped. What lies in the base as it is wanted shares its blocks where the file system offers that.
Blocks that are durable are written down in the journal, at the latest when a file is finished. Whoever writes a file,
and however often, writes the same bytes at the same places, and none beyond its end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streammerge.core import io, pages
from streammerge.core.digests import block_count, block_digest, block_number, block_range
from streammerge.core.errors import WriteError
from streammerge.planning.memory import PIECE
from streammerge.planning.model import OutputShard
from streammerge.sinks.buffers import Origin, WriteBehind
from streammerge.sinks.journal import Block, Journal, Made

BEHIND = 32 * 2**20
"""Bytes before a piece that are dropped from the page cache with it: by then they mostly are on the disk."""
PART = ".part"
"""Ends the name of a file in the making."""
AT_RISK = 2**30
SECONDS_AT_RISK = 10.0
"""Bytes that are made, and seconds that pass, before what is there is made durable and written down."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What an earlier run has left of a file: the blocks that were found good, and where. `inode` tells whether it
    still is the same file when it is opened again."""

    path: Path
    blocks: Mapping[int, Made]
    complete: bool
    inode: int


class ShardFile:
    """One weight file in the making. Pieces may come in any order and from any thread, each exactly once."""

    def __init__(self, shard: OutputShard, folder: Path, *, direct: bool, kept: Kept | None = None) -> None:
        self.shard, self.direct = shard, direct
        self.final = folder / shard.file
        self.part = str(kept.path if kept else folder / f"{shard.file}{PART}")
        self.staged = bool(kept and kept.complete)
        self._kept, self._lost = kept, False
        self._lock = threading.Lock()
        self._fds: dict[bool, int] = {}
        there = kept.blocks if kept else {}
        spans = {
            block: block_range(block, shard.size) for block in range(block_count(shard.size)) if block not in there
        }
        self._missing = {block: end - start for block, (start, end) in spans.items()}
        self._made: dict[int, Made] = {}
        self._settled: dict[int, Made] = {}

    @property
    def finished(self) -> bool:
        """Whether every byte is there."""
        return not self._missing

    def write(self, offset: int, data: memoryview, origin: Origin | None, made: Made | None) -> None:
        """Write a piece, or let the file share the blocks of its origin; `made` comes with the last piece of a block
        to be written down."""
        fd, size = self._open(), len(data)
        if not (origin and io.clone(origin[0].fd, origin[1], fd, offset, size)):
            aligned = size // io.ALIGNMENT * io.ALIGNMENT if self.direct else size
            io.write_at(fd, self.part, offset, data[:aligned], direct=self.direct)
            if aligned < size:  # the end of the file, which no direct write may go beyond
                io.write_at(self._open(direct=False), self.part, offset + aligned, data[aligned:])
        if not self.direct:
            first = max(0, offset - BEHIND)
            pages.drop(fd, first, offset + size - first)
        self._count(block_number(offset), size, made)

    def _count(self, block: int, size: int, made: Made | None) -> None:
        with self._lock:
            if made:
                self._made[block] = made
            self._missing[block] -= size
            if self._missing[block] == 0:
                del self._missing[block]
                self._settled[block] = self._made.pop(block)

    def settled(self) -> dict[int, Made]:
        """The blocks that were written since this was asked for last; durable after `sync`."""
        with self._lock:
            found, self._settled = self._settled, {}
        return found

    def sync(self) -> None:
        """Make durable what was written. Once that has failed it cannot be had any more: the system has dropped what it
        could not write, and would call the next attempt a success."""
        if self._lost:
            raise WriteError(self.part, "sync", "an earlier attempt failed")
        self._lost = True
        io.sync_file(self._open(), self.part)
        self._lost = False

    def stage(self) -> None:
        """Give a file that is durable its staged name."""
        if not self.direct:
            pages.drop(self._fds[False], 0, self.shard.size)
        self.close()
        io.rename(self.part, self.final)
        self.staged = True

    def close(self) -> None:
        """Close the file, finished or not."""
        with self._lock:
            for fd in self._fds.values():
                io.close(fd)
            self._fds.clear()

    def _open(self, direct: bool | None = None) -> int:
        """A descriptor of the file, which is made and reserved when it is first asked for."""
        direct = self.direct if direct is None else direct
        with self._lock:
            if not self._fds and not self._kept:
                io.remove(self.part)
                self._fds[direct] = io.create(self.part, direct=direct)
                io.allocate(self._fds[direct], self.part, self.shard.size)
            if direct not in self._fds:
                self._fds[direct] = io.open_again(self.part, direct=direct)
                if self._kept and io.state_of(self._fds[direct], self.part).inode != self._kept.inode:
                    raise WriteError(self.part, "go on with", "another run has replaced it")
            return self._fds[direct]


@dataclass(frozen=True, slots=True)
class Told:
    """Who is told of every piece, in bytes, and of every finished file, on the writing threads."""

    wrote: Callable[[int], None]
    finished: Callable[[OutputShard], None]


@dataclass(slots=True)
class _Risk:
    """What would be lost now."""

    bytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def due(self, size: int) -> bool:
        """Whether it is too much, with so many bytes more."""
        self.bytes += size
        if self.bytes < AT_RISK and time.monotonic() - self.since < SECONDS_AT_RISK:
            return False
        self.bytes, self.since = 0, time.monotonic()
        return True


class ShardSink:
    """All weight files of an output, in the folder of a run; `kept` is what an earlier one left there, by number.
    `mode` is `auto`, `direct` or `buffered`; `io` says which of the last two it came to."""

    def __init__(
        self,
        shards: Sequence[OutputShard],
        folder: Path,
        mode: str,
        buffers: int,
        told: Told,
        kept: Mapping[int, Kept] | None = None,
    ) -> None:
        direct = mode == "direct" or (mode == "auto" and io.takes_direct_writes(folder))
        self.io = "direct" if direct else "buffered"
        found = kept or {}
        self.files = [ShardFile(shard, folder, direct=direct, kept=found.get(n)) for n, shard in enumerate(shards)]
        self._behind = WriteBehind(buffers)
        self._journal, self._order, self._risk, self._told = Journal(folder), threading.Lock(), _Risk(), told

    def start(self) -> None:
        """Tell of the files that were there already, and stage those that lack nothing else."""
        for number, file in enumerate(self.files):
            if file.staged:
                self._told.finished(file.shard)
            elif file.finished:
                self._finish(number)

    def lease(self) -> memoryview:
        """Memory for a piece. Raises what an earlier write failed with."""
        return self._behind.lease()

    def release(self, buffer: memoryview) -> None:
        """Take back what will not be written."""
        self._behind.release(buffer)

    def commit(
        self, number: int, offset: int, buffer: memoryview, size: int, origin: Origin | None, made: Made | None
    ) -> None:
        """Write the first `size` bytes of a leased buffer to file `number`, which may begin with those of `origin`."""
        shares = origin if origin and not origin[1] % io.ALIGNMENT and not size % io.ALIGNMENT else None
        self._behind.submit(buffer, lambda: self._write(number, offset, buffer[:size], shares, made))

    def _write(self, number: int, offset: int, data: memoryview, origin: Origin | None, made: Made | None) -> None:
        file = self.files[number]
        file.write(offset, data, origin, made)
        self._told.wrote(len(data))
        with self._order:
            if file.finished and not file.staged:
                self._finish(number)
            elif self._risk.due(len(data)):
                self._write_down()

    def _write_down(self) -> None:
        """Make durable what is there, and write it down."""
        made: dict[Block, Made] = {}
        for number, file in enumerate(self.files):
            settled = file.settled()
            if settled:
                file.sync()
                made |= {(number, block): found for block, found in settled.items()}
        self._journal.add(made)

    def _finish(self, number: int) -> None:
        """Make a file durable, write its blocks down, and stage it: a staged file is one whose blocks are all known."""
        file = self.files[number]
        settled = file.settled()
        file.sync()
        self._journal.add({(number, block): found for block, found in settled.items()})
        file.stage()
        self._told.finished(file.shard)

    def finish(self) -> None:
        """Return when every file is durable under its staged name. Raises what a write failed with."""
        self._behind.finish()

    def keep(self) -> None:
        """After a failure: write down what there is, for the run that follows."""
        self._behind.close()
        self._write_down()

    def close(self) -> None:
        """Stop writing, and close what is open."""
        self._behind.close()
        for file in self.files:
            file.close()
        self._journal.close()


def copy_file(source: str, folder: Path, name: str) -> tuple[int, list[str]]:
    """Copy a sidecar to `name` in the folder of a run, durably; its size and the digests of its blocks."""
    target, part = folder / name, folder / f"{name}{PART}"
    io.make_dirs_of(folder, name)
    io.remove(part)
    fd = io.open_input(source)
    try:
        out = io.create(part)
        try:
            size = io.state_of(fd, source).size
            ranges = [block_range(number, size) for number in range(block_count(size))]
            blocks = [block_digest(_copied(fd, source, out, part, *span)) for span in ranges]
            io.sync_file(out, str(part))
        finally:
            io.close(out)
    finally:
        io.close(fd)
    io.rename(part, target)
    return size, blocks


def _copied(fd: int, source: str, out: int, target: Path, start: int, end: int) -> Iterator[bytearray]:
    for first in range(start, end, PIECE):
        data = io.read_at(fd, source, first, min(PIECE, end - first))
        io.write_at(out, str(target), first, data)
        yield data
