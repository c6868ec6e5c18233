"""What an earlier run of the same plan has left, and how much of it is good.

Nothing is believed: a block counts if the journal has its digest and the bytes, read again now, have the same. A file
whose blocks are all good stays where it is, staged or published; of any other the good blocks are kept and the rest is
made again, in the same file. What belongs to no file is removed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from streammerge.core import io, pages
from streammerge.core.digests import block_count, block_digest, block_range
from streammerge.core.errors import InputError
from streammerge.core.resources import ThreadPool
from streammerge.planning.memory import PIECE
from streammerge.planning.model import OutputShard
from streammerge.sinks.journal import Block, Made, read_journal
from streammerge.sinks.shards import PART, Kept


@dataclass(frozen=True, slots=True)
class Recovered:
    """What is kept, by the number of the file."""

    files: Mapping[int, Kept] = field(default_factory=dict)

    @property
    def blocks(self) -> dict[Block, Made]:
        """Every good block."""
        return {(number, block): made for number, kept in self.files.items() for block, made in kept.blocks.items()}


class _Reader:
    """Reads blocks on so many threads, and tells how many bytes of how many it has read. Stops at the next piece when
    `with` is left; what it was to read then, nobody needs."""

    def __init__(self, workers: int, total: int, told: Callable[[int, int], None]) -> None:
        self._pool = ThreadPool(workers, "recover")
        self._total, self._told = total, told
        self._stop = threading.Event()

    def __enter__(self) -> _Reader:
        if self._total:
            self._told(0, self._total)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def good(self, fd: int, path: str, spans: Sequence[tuple[int, int]], digests: Sequence[str]) -> Iterable[bool]:
        """For each block of a file whether its bytes, read now, have the digest they should have."""

        def is_good(span: tuple[int, int], digest: str) -> bool:
            start, end = span
            try:
                return block_digest(self._pieces(fd, path, start, end)) == digest
            except InputError:
                return False
            finally:
                pages.drop(fd, start, end - start)
                self._told(end - start, self._total)

        return self._pool.map(is_good, spans, digests)

    def _pieces(self, fd: int, path: str, start: int, end: int) -> Iterator[bytearray]:
        for first in range(start, end, PIECE):
            if self._stop.is_set():
                return
            yield io.read_at(fd, path, first, min(PIECE, end - first))


def recover(
    shards: Sequence[OutputShard], run: Path, output: Path, workers: int, told: Callable[[int, int], None]
) -> Recovered:
    """Look through the folder of a run and what it has published in `output`, on so many threads. `told` gets the bytes
    that were read since it was called last, and how many there are in all, if there are any.

    Raises WriteError where what is not good cannot be removed.
    """
    journal = read_journal(run)
    found: dict[int, Kept] = {}
    sizes = [shard.size for shard in shards]
    spans = [block_range(block, sizes[number]) for number, block in journal if 0 <= number < len(sizes)]
    with _Reader(workers, sum(max(0, end - start) for start, end in spans), told) as reader:
        for number, shard in enumerate(shards):
            wanted = {block: made for (file, block), made in journal.items() if file == number}
            part = run / f"{shard.file}{PART}"
            # What is in place already is taken if it is good, and else left to be replaced: it may be another run's.
            published = output / shard.file
            kept = _examined(reader, shard, wanted, published) if io.exists(published) else None
            if not (kept and kept.complete):
                kept = _best(reader, shard, wanted, [run / shard.file, part])
            if kept:
                found[number] = kept if kept.complete else _adopted(kept, part)
    return Recovered(found)


def _best(reader: _Reader, shard: OutputShard, wanted: Mapping[int, Made], paths: list[Path]) -> Kept | None:
    """The first of the files that is complete, or the one with most good blocks; the others are removed."""
    best: Kept | None = None
    for path in filter(io.exists, paths):
        found = _examined(reader, shard, wanted, path) if not (best and best.complete) else None
        if found and len(found.blocks) > (len(best.blocks) if best else 0):
            if best:
                io.remove(best.path)
            best = found
        else:
            io.remove(path)
    return best


def _examined(reader: _Reader, shard: OutputShard, wanted: Mapping[int, Made], path: Path) -> Kept:
    """The blocks of a file that have the digests they should have."""
    try:
        fd = io.open_input(path, links=False)
    except InputError:
        return Kept(path, {}, False, 0)
    try:
        state = io.state_of(fd, str(path))
        # One that is too long is not the file it should be, whatever its blocks are.
        count = block_count(shard.size) if state.size <= shard.size else 0
        blocks = [block for block in wanted if 0 <= block < count]
        spans, digests = [block_range(n, shard.size) for n in blocks], [wanted[n].digest for n in blocks]
        good = reader.good(fd, str(path), spans, digests)
        kept = {block: wanted[block] for block, is_good in zip(blocks, good, strict=True) if is_good}
    finally:
        io.close(fd)
    complete = len(kept) == block_count(shard.size) and state.size == shard.size and not path.name.endswith(PART)
    return Kept(path, kept, complete, state.inode)


def _adopted(kept: Kept, part: Path) -> Kept:
    """A file that was staged and is not good any more, as an unfinished one."""
    if kept.path != part:
        io.rename(kept.path, part)
    return Kept(part, kept.blocks, False, kept.inode)
