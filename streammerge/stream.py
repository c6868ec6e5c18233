"""One pass over a plan: every block of every output file is made, digested, and handed to a sink.

A block is the unit of work, digests and verification. Workers take blocks in order and fill pieces of them; a signal or
an error stops all of them at the next piece.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import xxhash

from streammerge.compute.devices import DeviceMaker
from streammerge.compute.lanes import Cpu
from streammerge.compute.produce import Producer
from streammerge.core import io
from streammerge.core.digests import block_count, block_range
from streammerge.planning.memory import PIECE
from streammerge.planning.model import MergePlan
from streammerge.report import StatsCollector, WrittenFile
from streammerge.sinks.buffers import Sink
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Event:
    """What a progress callback gets. `kind` is `start` (bytes in all), `bytes` (written since the last), `shard` (a
    file was finished), `publish` or `verify`."""

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
        self.producer = Producer(plan, inputs.checkpoint, inputs.adapters, self.stats, device)
        self._digests = [[""] * block_count(shard.size) for shard in plan.shards]
        self._stop = threading.Event()

    def into(self, sink: Sink) -> dict[str, WrittenFile]:
        """Sizes and digests of all weight files, when the sink has them."""
        jobs = [(n, block) for n, shard in enumerate(self.plan.shards) for block in range(block_count(shard.size))]
        try:
            with self.producer.threads.kept():
                run_jobs(jobs, lambda job: self._block(sink, *job), self.plan.figures.workers, self._stop)
            sink.finish()
        finally:
            sink.close()
        shards = zip(self.plan.shards, self._digests, strict=True)
        return {shard.file: WrittenFile(shard.size, tuple(blocks)) for shard, blocks in shards}

    def _block(self, sink: Sink, number: int, block: int) -> None:
        start, end = block_range(block, self.plan.shards[number].size)
        digest = xxhash.xxh3_128()
        for first in range(start, end, PIECE):
            last = min(first + PIECE, end)
            buffer = sink.lease()
            try:
                if self._stop.is_set():
                    raise Cancelled
                piece = buffer[: last - first]
                self.producer.fill(number, first, last, piece)
                origin = self.producer.verbatim(number, first, last)
            except BaseException:
                sink.release(buffer)
                raise
            digest.update(piece)
            sink.commit(number, first, buffer, last - first, origin)
        self._digests[number][block] = digest.hexdigest()


def run_jobs(jobs: Sequence[Any], work: Callable[[Any], None], workers: int, stop: threading.Event) -> None:
    """Do all jobs on `workers` threads; the first failure sets `stop`, which ends the others, and is raised."""

    def attempt(job: Any) -> None:
        try:
            work(job)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="streammerge") as pool:
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
    buffer = io.aligned_buffer(min(PIECE, end - start))
    digest = xxhash.xxh3_128()
    for first in range(start, end, PIECE):
        if stop.is_set():
            raise Cancelled
        piece = buffer[: min(PIECE, end - first)]
        producer.fill(number, first, first + len(piece), piece)
        digest.update(piece)
    return digest.hexdigest()
