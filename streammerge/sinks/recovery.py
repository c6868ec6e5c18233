"""What an earlier run of the same plan has left, and how much of it is good.

Nothing is believed: a block counts if the journal has its digest and the bytes, read again now, have the same. A file
whose blocks are all good stays where it is, staged or published; of any other the good blocks are kept and the rest is
made again, in the same file. What belongs to no file is removed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from streammerge.core import io
from streammerge.core.digests import block_count, block_digest, block_range
from streammerge.core.errors import InputError
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


def recover(shards: Sequence[OutputShard], run: Path, output: Path, workers: int) -> Recovered:
    """Look through the folder of a run and what it has published in `output`, on so many threads.

    Raises WriteError where what is not good cannot be removed.
    """
    journal = read_journal(run)
    there = io.list_dir(run)
    found: dict[int, Kept] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="streammerge-recover") as pool:
        for number, shard in enumerate(shards):
            wanted = {block: made for (file, block), made in journal.items() if file == number}
            parts = [run / name for name in there if name.startswith(f"{shard.file}.") and name.endswith(PART)]
            # What is in place already is taken if it is good, and else left to be replaced: it may be another run's.
            published = output / shard.file
            kept = _examined(pool, shard, wanted, published) if io.exists(published) else None
            if not (kept and kept.complete):
                kept = _best(pool, shard, wanted, [run / shard.file, *parts])
            if kept:
                found[number] = kept if kept.complete else _adopted(kept, run / f"{shard.file}.{os.getpid()}{PART}")
    return Recovered(found)


def _best(pool: ThreadPoolExecutor, shard: OutputShard, wanted: Mapping[int, Made], paths: list[Path]) -> Kept | None:
    """The first of the files that is complete, or the one with most good blocks; the others are removed."""
    best: Kept | None = None
    for path in filter(io.exists, paths):
        found = _examined(pool, shard, wanted, path) if not (best and best.complete) else None
        if found and len(found.blocks) > (len(best.blocks) if best else 0):
            if best:
                io.remove(best.path)
            best = found
        else:
            io.remove(path)
    return best


def _examined(pool: ThreadPoolExecutor, shard: OutputShard, wanted: Mapping[int, Made], path: Path) -> Kept:
    """The blocks of a file that have the digests they should have."""
    try:
        fd = io.open_input(path)
    except InputError:
        return Kept(path, {}, False, 0)
    try:
        state = io.state_of(fd, str(path))

        def good(block: int) -> bool:
            start, end = block_range(block, shard.size)
            spans = ((first, min(PIECE, end - first)) for first in range(start, end, PIECE))
            try:
                return block_digest(io.read_at(fd, str(path), *span) for span in spans) == wanted[block].digest
            except InputError:
                return False

        # One that is too long is not the file it should be, whatever its blocks are.
        count = block_count(shard.size) if state.size <= shard.size else 0
        blocks = [block for block in wanted if 0 <= block < count]
        kept = {block: wanted[block] for block, is_good in zip(blocks, pool.map(good, blocks), strict=True) if is_good}
    finally:
        io.close(fd)
    complete = len(kept) == block_count(shard.size) and state.size == shard.size and not path.name.endswith(PART)
    return Kept(path, kept, complete, state.inode)


def _adopted(kept: Kept, part: Path) -> Kept:
    """An unfinished file under a name of our own: an earlier run that is still alive finds its file gone, and stops."""
    if kept.path != part:
        io.rename(kept.path, part)
    return Kept(part, kept.blocks, False, kept.inode)
