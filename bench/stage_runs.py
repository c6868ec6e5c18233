"""The stages of a merge one at a time, on the package's own code: reading a base, the arithmetic, writing files.

Every figure is a row: what was done, seconds, CPU seconds, bytes. Reading and writing hand over the pieces that a merge
does; blocks are taken in order by as many threads as there are workers.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock, local

import numpy as np
from measure import evict

from streammerge.core import io, pages
from streammerge.core.digests import block_count, block_number, block_range
from streammerge.core.options import Options
from streammerge.planning.build import build_plan
from streammerge.planning.memory import PIECE, buffer_count
from streammerge.planning.model import MergePlan, OutputShard
from streammerge.sinks.journal import Made
from streammerge.sinks.null import NullSink
from streammerge.sinks.shards import ShardSink, Told
from streammerge.sources.adapter import open_adapter
from streammerge.sources.checkpoint import open_checkpoint
from streammerge.sources.files import OpenFile, Scratch
from streammerge.stream import Inputs, Stream, run_jobs

Row = dict[str, str | int | float]
Reader = Callable[[OpenFile, int, int, Scratch], None]
"""Reads bytes [start, end) of a file."""


def timed(what: Row, size: int, work: Callable[[], object]) -> Row:
    """A row: `what`, and what `work` on `size` bytes took."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return what | {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "bytes": size}


def touched(file: OpenFile, start: int, end: int, scratch: Scratch) -> None:
    """Mapped: one byte of every page, and the pages given back."""
    assert file.mapping is not None
    seen = np.frombuffer(file.read(start, end, scratch), np.uint8)
    seen[:: io.PAGE].sum()
    del seen
    pages.give_back(file.mapping, start, end)


def read(file: OpenFile, start: int, end: int, scratch: Scratch) -> None:
    """By a system call, past the page cache where the file was opened so."""
    file.read(start, end, scratch)


def cached(file: OpenFile, start: int, end: int, scratch: Scratch) -> None:
    """Into the page cache only."""
    while start < end:
        start += pages.cache(file.fd, file.path, start, end - start) or end


@dataclass(frozen=True)
class Way:
    """A way to read."""

    name: str
    mapped: bool
    direct: bool
    reader: Reader


WAYS = (
    Way("mapped", True, False, touched),
    Way("pread", False, False, read),
    Way("direct", False, True, read),
    Way("read-ahead", False, False, cached),
)


def each_piece(sizes: Sequence[int], workers: int, work: Callable[[int, int, int], None]) -> None:
    """Call `work` with file, first and last byte of every piece of files of these sizes: a block to a thread."""
    jobs = [(number, block) for number, size in enumerate(sizes) for block in range(block_count(size))]

    def block(job: tuple[int, int]) -> None:
        start, end = block_range(job[1], sizes[job[0]])
        for first in range(start, end, PIECE):
            work(job[0], first, min(first + PIECE, end))

    run_jobs(jobs, block, workers, Event())


def read_all(files: Sequence[OpenFile], workers: int, reader: Reader) -> None:
    """Read open files to their end."""
    kept = local()

    def piece(number: int, start: int, end: int) -> None:
        if not hasattr(kept, "scratch"):
            kept.scratch = Scratch()
        reader(files[number], start, end, kept.scratch)

    each_piece([file.state.size for file in files], workers, piece)


def read_rows(paths: Sequence[Path], workers: Sequence[int]) -> Iterator[Row]:
    """Every way of reading, cold and warm."""
    size = sum(path.stat().st_size for path in paths)
    for way in WAYS:
        for cache in ("cold", "warm"):
            for count in workers:
                if cache == "cold":
                    evict([paths[0].parent])
                else:
                    read_all([OpenFile(path, mapped=False, direct=False) for path in paths], 1, cached)
                files = [OpenFile(path, mapped=way.mapped, direct=way.direct) for path in paths]
                what: Row = {"stage": "read", "way": way.name, "cache": cache, "workers": count}
                yield timed(what, size, partial(read_all, files, count, way.reader))


def tile_rows(base: Path, adapters: dict[int, Path], workers: Sequence[int]) -> Iterator[Row]:
    """The arithmetic alone: a whole merge on a warm base that is written nowhere."""
    for rank, adapter in adapters.items():
        for accumulate in ("float64", "float32"):
            for count in workers:
                plan, inputs = planned(base, adapter, Options(workers=count, accumulate=accumulate))
                what: Row = {"stage": "tile", "r": rank, "accumulate": accumulate, "workers": plan.figures.workers}
                sink = NullSink(buffer_count(plan.figures.workers))
                yield timed(what, plan.figures.write, partial(Stream(plan, inputs).into, sink))


def planned(base: Path, adapter: Path, options: Options) -> tuple[MergePlan, Inputs]:
    """A plan and what it is carried out on."""
    checkpoint = open_checkpoint(str(base), options.read)
    inputs = Inputs(checkpoint, [open_adapter(str(adapter), options.read)])
    return build_plan(checkpoint, inputs.adapters, [1.0], options), inputs


class Filler:
    """Fills each of a sink's buffers once: what is written is no zeros, and making it is not part of the time."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._lock = Lock()

    def fill(self, buffer: memoryview) -> None:
        """Put noise into a buffer that is new."""
        with self._lock:
            new = id(buffer) not in self._seen
            self._seen.add(id(buffer))
        if new:
            buffer[:] = os.urandom(len(buffer))


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A directory for files in the making, removed afterwards."""
    folder = directory / "written"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def write_all(sink: ShardSink, sizes: Sequence[int], workers: int, sources: Sequence[OpenFile]) -> None:
    """Files of these sizes, durable: noise, or what is read of as many `sources`."""
    filler = Filler()

    def piece(number: int, start: int, end: int) -> None:
        buffer = sink.lease()
        if sources:
            io.read_into(sources[number].fd, sources[number].path, start, buffer[: end - start])
        else:
            filler.fill(buffer)
        is_last = end == block_range(block_number(start), sizes[number])[1]
        sink.commit(number, start, buffer, end - start, None, Made("") if is_last else None)

    try:
        each_piece(sizes, workers, piece)
        sink.finish()
    finally:
        sink.close()


def write_rows(paths: Sequence[Path], directory: Path, workers: int) -> Iterator[Row]:
    """Files as large as the base's, directly and through the page cache: of what is there, and read from a cold base at
    the same time, which is the least that a merge can take."""
    sizes = [path.stat().st_size for path in paths]
    shards = [OutputShard(path.name, size, b"", {}) for path, size in zip(paths, sizes, strict=True)]
    for copied in (False, True):
        for mode in ("direct", "buffered"):
            with staging(directory) as folder:
                evict([paths[0].parent])
                sources = [OpenFile(path, mapped=False, direct=False) for path in paths] if copied else []
                sink = ShardSink(
                    shards, folder, mode, buffer_count(workers), Told(lambda count: None, lambda shard: None)
                )
                what: Row = {"stage": "write", "way": mode, "from": "cold files" if copied else "memory"}
                yield timed(what | {"workers": workers}, sum(sizes), partial(write_all, sink, sizes, workers, sources))
