"""One pass over a plan: every block of every output file is made, digested, and handed to a sink.

A block is the unit of work, digests and verification. Workers take blocks in order and fill pieces of them; a signal or
an error stops all of them at the next piece.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import Any

import xxhash

from streammerge.compute.devices import DeviceMaker
from streammerge.compute.lanes import Cpu
from streammerge.compute.produce import Producer
from streammerge.compute.tile import TileStats
from streammerge.core.digests import block_count, block_range
from streammerge.core.errors import StreamMergeError
from streammerge.core.resources import ThreadPool, aligned_buffer
from streammerge.planning.memory import PIECE
from streammerge.planning.model import MergePlan
from streammerge.report import StatsCollector, WrittenFile
from streammerge.sinks.buffers import Origin, Sink
from streammerge.sinks.journal import Block, Made
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Event:
    """What a progress callback gets. `kind` is `reread` (bytes that an earlier run has left, and that are read again
    first), `start` (bytes in all), `resume` (bytes of `count` blocks that were found good), `bytes` (done since the
    last), `shard` (a file was finished), `publish` or `verify` (bytes to be read, or none)."""

    kind: str
    bytes: int = 0
    file: str = ""
    number: int = 0
    count: int = 0


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The progress callback of a library: nothing."""


class Cancelled(Exception):
    """Stops a worker after another one failed."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a plan is carried out on. `rules` is the path of a table of conversion rules that is not the shipped one."""

    checkpoint: Checkpoint
    adapters: Sequence[Adapter]
    rules: str = ""


class Stream:
    """One pass over a plan: every block of every file is made by some worker, digested, and handed to a sink."""

    def __init__(self, plan: MergePlan, inputs: Inputs, device: DeviceMaker = Cpu) -> None:
        self.plan = plan
        self.stats = StatsCollector(plan)
        self.producer = Producer(plan, inputs.checkpoint, inputs.adapters, self._note, device)
        self._local = threading.local()
        self._digests = [[""] * block_count(shard.size) for shard in plan.shards]
        self._stop = threading.Event()

    def into(self, sink: Sink, there: Mapping[Block, Made] | None = None) -> dict[str, WrittenFile]:
        """Sizes and digests of all weight files, when the sink has them; blocks that are `there` are not made."""
        blocks = [(n, block) for n, shard in enumerate(self.plan.shards) for block in range(block_count(shard.size))]
        jobs = [block for block in blocks if not there or block not in there]
        try:
            sink.start()
            for block, made in (there or {}).items():
                self._take(block, made)
            with self.producer.threads.kept():
                run_jobs(jobs, lambda job: self._block(sink, *job), self.plan.figures.workers, self._stop)
            sink.finish()
        except BaseException:
            with contextlib.suppress(StreamMergeError):
                sink.keep()
            raise
        finally:
            sink.close()
        shards = zip(self.plan.shards, self._digests, strict=True)
        return {shard.file: WrittenFile(shard.size, tuple(blocks)) for shard, blocks in shards}

    def _block(self, sink: Sink, number: int, block: int) -> None:
        start, end = block_range(block, self.plan.shards[number].size)
        digest = xxhash.xxh3_128()
        self._local.notes = []
        for first in range(start, end, PIECE):
            last = min(first + PIECE, end)
            buffer = sink.lease()
            piece = buffer[: last - first]
            try:
                origin = self._fill(number, first, last, piece)
            except BaseException:
                sink.release(buffer)
                raise
            digest.update(piece)
            made = Made(digest.hexdigest(), tuple(self._local.notes)) if last == end else None
            if made:
                self._take((number, block), made)
            sink.commit(number, first, buffer, last - first, origin, made)

    def _fill(self, number: int, start: int, end: int, into: memoryview) -> Origin | None:
        """Make a piece, unless all is to stop; where its bytes lie in the base as they are, if they do."""
        if self._stop.is_set():
            raise Cancelled
        self.producer.fill(number, start, end, into)
        return self.producer.verbatim(number, start, end)

    def _note(self, tensor: str, tile: int, stats: TileStats) -> None:
        """Remember a measurement with the block that this thread is at."""
        self._local.notes.append((tensor, tile, stats))

    def _take(self, block: Block, made: Made) -> None:
        """Enter a finished block into the results."""
        self._digests[block[0]][block[1]] = made.digest
        for note in made.notes:
            self.stats(*note)


def run_jobs(jobs: Sequence[Any], work: Callable[[Any], None], workers: int, stop: threading.Event) -> None:
    """Do all jobs on `workers` threads; the first failure sets `stop`, which ends the others, and is raised."""

    def attempt(job: Any) -> None:
        try:
            work(job)
        except BaseException:
            stop.set()
            raise

    with ThreadPool(workers, "work") as pool:
        futures: list[Future[None]] = [pool.submit(attempt, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Set on the way out of a success too, where nobody is left to see it.
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Cancelled)):
        raise error


def derived_digest(producer: Producer, number: int, block: int, stop: threading.Event) -> str:
    """The digest of a block of an output file, made once more and kept nowhere."""
    start, end = block_range(block, producer.plan.shards[number].size)
    buffer = aligned_buffer(min(PIECE, end - start))
    digest = xxhash.xxh3_128()
    for first in range(start, end, PIECE):
        if stop.is_set():
            raise Cancelled
        piece = buffer[: min(PIECE, end - first)]
        producer.fill(number, first, first + len(piece), piece)
        digest.update(piece)
    return digest.hexdigest()
