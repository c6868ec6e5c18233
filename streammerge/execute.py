"""Carrying out a plan: claim the output, write every shard block by block, publish, mark.

A block of an output file is the unit of work, digests and verification. Workers take blocks in order and pull their
bytes from the producer; a signal or an error stops all of them at the next piece.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.compute.produce import Producer, shard_bytes
from streammerge.core import io, strict_json
from streammerge.core.digests import block_count, block_digest, block_range
from streammerge.core.errors import NoSpaceError, StreamMergeError
from streammerge.planning.model import MergePlan
from streammerge.report import Report, StatsCollector, WrittenFile, document_of
from streammerge.sinks.directory import CONFIG, INDEX, INPUTS, MARKER, OutputDirectory, State
from streammerge.sinks.shards import ShardFile, copy_file
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import LOCAL, Checkpoint

SAMPLES, SAMPLE_BYTES = 16, 4096
"""Stretches of each base file whose bytes go into the fingerprint."""


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


def fingerprint_of(plan: MergePlan, checkpoint: Checkpoint) -> str:
    """SHA-256 of the plan and of samples of the base's weights: everything that can change a byte of the output."""
    digest = hashlib.sha256(plan.digest().encode())
    for shard in checkpoint.facts.shards:
        size = checkpoint.files.size(shard.file)
        digest.update(f"{shard.file}\0{size}".encode())
        for number in range(SAMPLES):
            start = (size - SAMPLE_BYTES) * number // (SAMPLES - 1) if size > SAMPLE_BYTES else 0
            digest.update(checkpoint.files.raw(shard.file, start, min(size, start + SAMPLE_BYTES)))
    return digest.hexdigest()


def execute(
    plan: MergePlan, inputs: Inputs, output: Path, *, overwrite: bool = False, progress: Progress = silent
) -> Report:
    """Carry out `plan` into `output` and return the report.

    Raises OutputExistsError, NoSpaceError, WriteError, InputReadError or NonFiniteError; nothing that a loader would
    take is left behind then, nor after an exception from a signal handler.
    """
    began = time.monotonic()
    directory = OutputDirectory(output)
    directory.refuse_inside([inputs.checkpoint.facts.root, *(adapter.facts.root for adapter in inputs.adapters)])
    fingerprint = fingerprint_of(plan, inputs.checkpoint)
    files = [*(shard.file for shard in plan.shards), *(sidecar.name for sidecar in plan.sidecars)]
    if overwrite or directory.state() is not State.FINISHED:
        check_space(plan, output, directory.reclaimable())
    if not directory.claim(plan.digest(), fingerprint, files, overwrite=overwrite):
        document = strict_json.loads(io.read_file(output / MARKER, strict_json.MAX_BYTES), str(output / MARKER))
        return Report(output, document, "already complete", time.monotonic() - began)
    run = _Run(plan, inputs, directory, progress)
    try:
        with single_threaded_torch():
            written = run.write_shards()
            document = run.publish(written, fingerprint)
    except BaseException:
        run.close()
        with contextlib.suppress(StreamMergeError):
            # What cannot be removed now stays behind as an unfinished run, which the next one removes.
            directory.abandon()
        raise
    return Report(output, document, "done", time.monotonic() - began, notes=plan.notes)


def check_space(plan: MergePlan, output: Path, reclaimable: int) -> None:
    """Raise NoSpaceError if the file system of `output` has less free than the plan writes, with what will be removed
    before that counted as free."""
    existing = next(path for path in (output, *output.absolute().parents) if io.exists(path))
    needed = plan.figures.write + sum(io.size_of(sidecar.path) for sidecar in plan.sidecars)
    free = io.free_space(existing) + reclaimable
    if free < needed:
        raise NoSpaceError(str(existing), needed=needed, free=free)


class _Run:
    """One execution: the files in the making, and what stops it."""

    def __init__(self, plan: MergePlan, inputs: Inputs, directory: OutputDirectory, progress: Progress) -> None:
        self.plan, self.inputs, self.directory, self.progress = plan, inputs, directory, progress
        self.stats = StatsCollector()
        self.producer = Producer(plan, inputs.checkpoint, inputs.adapters, self.stats)
        self.files = [ShardFile(shard, directory.staging) for shard in plan.shards]
        self.stop = threading.Event()
        self._finished = 0
        self._lock = threading.Lock()

    def write_shards(self) -> dict[str, WrittenFile]:
        """Write every weight file into the staging area."""
        self.progress(Event("start", self.plan.figures.write, count=len(self.files)))
        jobs = [(n, block) for n, file in enumerate(self.files) for block in range(block_count(file.shard.size))]
        run_jobs(jobs, lambda job: self._write_block(*job), self.plan.figures.workers, self.stop)
        return {file.shard.file: WrittenFile(file.shard.size, tuple(file.blocks)) for file in self.files}

    def _write_block(self, number: int, block: int) -> None:
        file = self.files[number]
        start, end = block_range(block, file.shard.size)
        last = file.write_block(
            block, start, stoppable(shard_bytes(self.producer, number, start, end), self.stop), self._wrote
        )
        if last:
            file.finish()
            with self._lock:
                self._finished += 1
                event = Event("shard", file.shard.size, file.shard.file, self._finished, len(self.files))
            self.progress(event)

    def _wrote(self, count: int) -> None:
        self.progress(Event("bytes", count))

    def publish(self, files: Mapping[str, WrittenFile], fingerprint: str) -> dict[str, Any]:
        """Copy sidecars, move everything into place, write the completion marker."""
        self.progress(Event("publish"))
        plan, directory = self.plan, self.directory
        sidecars = {}
        for sidecar in plan.sidecars:
            size, blocks = copy_file(sidecar.path, directory.staging / sidecar.name)
            sidecars[sidecar.name] = WrittenFile(size, tuple(blocks))
        late = {name: data for name, data in ((INDEX, plan.index), (CONFIG, plan.config)) if data is not None}
        for name, data in late.items():
            spans = [block_range(n, len(data)) for n in range(block_count(len(data)))]
            sidecars[name] = WrittenFile(len(data), tuple(block_digest([data[a:b]]) for a, b in spans))
        document = document_of(plan, fingerprint, self.stats, files, sidecars)
        origin = {
            "base": _where(self.inputs.checkpoint.facts.origin, self.inputs.checkpoint.facts.identity),
            "adapters": [_where(item.facts.root, item.facts.identity) for item in self.inputs.adapters],
            **({"rules": self.inputs.rules} if self.inputs.rules else {}),
        }
        late |= {INPUTS: strict_json.dumps(origin), MARKER: strict_json.dumps(document)}
        directory.publish([*files, *(sidecar.name for sidecar in plan.sidecars)], late)
        return document

    def close(self) -> None:
        """Close what is open."""
        for file in self.files:
            file.close()


def _where(path: Path, identity: str) -> str:
    """Where a later `verify` finds an input: the commit on the Hub, or the absolute path."""
    return identity if identity != LOCAL else str(path.absolute())


def run_jobs(jobs: Sequence[Any], work: Callable[[Any], None], workers: int, stop: threading.Event) -> None:
    """Do all jobs on `workers` threads; the first failure stops the others and is raised."""
    with ThreadPoolExecutor(workers, thread_name_prefix="streammerge", initializer=_one_thread) as pool:
        futures: list[Future[None]] = [pool.submit(work, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Set on the way out of a success too, where nobody is left to see it.
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Cancelled)):
        raise error


def stoppable(pieces: Iterator[memoryview], stop: threading.Event) -> Iterator[memoryview]:
    """The pieces, until somebody asks to stop."""
    for piece in pieces:
        if stop.is_set():
            raise Cancelled
        yield piece


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Leave torch's number of threads as it was, whatever the workers set."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
