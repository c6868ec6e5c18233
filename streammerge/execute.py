"""Carrying out a plan: claim the output, stream every shard into the staging area, publish, mark."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.compute.devices import device_of
from streammerge.core import io, strict_json
from streammerge.core.digests import block_count, block_digest, block_range, sealed
from streammerge.core.errors import (
    AdapterError,
    InputMissingError,
    NoSpaceError,
    OutputExistsError,
    StreamMergeError,
    UsageError,
    WriteError,
)
from streammerge.core.options import Options
from streammerge.planning.memory import buffer_count
from streammerge.planning.model import MergePlan, OutputShard
from streammerge.report import Report, WrittenFile, document_of, origin_of
from streammerge.sinks.directory import CONFIG, INDEX, MARKER, OutputDirectory, State
from streammerge.sinks.hashes import SUMS, FileHashes, sums_of
from streammerge.sinks.journal import read_journal
from streammerge.sinks.records import INPUTS
from streammerge.sinks.recovery import Recovered, recover
from streammerge.sinks.run_folder import vanished
from streammerge.sinks.shards import ShardSink, Told, copy_file
from streammerge.sources.checkpoint import LOCAL, Checkpoint
from streammerge.stream import Event, Inputs, Progress, Stream, silent

SAMPLES, SAMPLE_BYTES = 16, 4096
"""Stretches of each base file whose bytes go into the fingerprint."""


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
    plan: MergePlan, inputs: Inputs, output: Path, options: Options | None = None, progress: Progress = silent
) -> Report:
    """Carry out `plan` into `output` and return the report. Of `options`, only what changes no byte is looked at.

    Raises OutputExistsError, NoSpaceError, WriteError, InputReadError or NonFiniteError; nothing that a loader would
    take is left behind then, nor after an exception from a signal handler.
    """
    began, chosen = time.monotonic(), options or Options()
    directory = OutputDirectory(output)
    directory.refuse_inside([inputs.checkpoint.facts.root, *(adapter.facts.root for adapter in inputs.adapters)])
    sizes = [shard.size for shard in plan.shards]
    identity = {"fingerprint": fingerprint_of(plan, inputs.checkpoint), **origin_of(plan)}
    about = {**identity, "sizes": sizes, "inputs": whereabouts(inputs), "base_files": base_files(inputs.checkpoint)}
    files = [*(shard.file for shard in plan.shards), *(sidecar.name for sidecar in plan.sidecars)]
    files += [SUMS] if plan.options.get("sha256") else []
    try:
        with _undisturbed(output):
            if chosen.overwrite or directory.state() is not State.FINISHED:
                check_space(plan, output, directory.reclaimable())
                refuse_io(chosen.io, output)
            if not directory.claim(about, files, overwrite=chosen.overwrite):
                return Report(output, directory.marker(), "already complete", time.monotonic() - began)
        publisher = Publisher(plan, inputs, directory, progress)
        try:
            with _undisturbed(output):
                how = publisher.write_shards(chosen)
                document = publisher.publish(identity["fingerprint"])
        except BaseException as error:
            publisher.give_up(error)
            raise
    finally:
        directory.release()
    return Report(output, document, "done", time.monotonic() - began, io=how, notes=plan.notes)


@contextlib.contextmanager
def _undisturbed(output: Path) -> Iterator[None]:
    """While an output is worked on: what vanishes from it was taken by another run, or removed by somebody else."""
    try:
        yield
    except (InputMissingError, WriteError) as error:
        if not vanished(error) or not Path(error.path).is_relative_to(output):
            raise
        reason = f"another run is at work on `{output}`: `{error.path}` vanished while it was in use"
        raise OutputExistsError(reason, "wait for it, and run the same command again") from None


def refuse_io(mode: str, output: Path) -> None:
    """Raise UsageError for `--io direct` where the file system of `output` cannot do it, before anything is removed."""
    existing = _existing(output)
    if mode == "direct" and not io.takes_direct_writes(existing):
        reason = f"`--io direct` was asked for, and the file system of `{existing}` cannot do it"
        raise UsageError(reason, "`--io auto` writes through the page cache there")


def check_space(plan: MergePlan, output: Path, reclaimable: int) -> None:
    """Raise NoSpaceError if the file system of `output` has less free than the plan writes, with what will be removed
    before that counted as free."""
    existing = _existing(output)
    needed = plan.figures.write + sum(io.size_of(sidecar.path) for sidecar in plan.sidecars)
    free = io.free_space(existing) + reclaimable
    if free < needed:
        raise NoSpaceError(str(existing), needed=needed, free=free)


def _existing(output: Path) -> Path:
    """The output, or the nearest folder above it that is there."""
    return next(path for path in (output, *output.absolute().parents) if io.exists(path))


class Publisher:
    """One execution: the files in the making, and their way into the output directory."""

    def __init__(self, plan: MergePlan, inputs: Inputs, directory: OutputDirectory, progress: Progress) -> None:
        self.plan, self.inputs, self.directory, self.progress = plan, inputs, directory, progress
        self._finished = 0
        self._lock = threading.Lock()
        self._hashes = FileHashes() if plan.options.get("sha256") else None
        self._recovered = Recovered()

    def write_shards(self, options: Options) -> str:
        """Write every weight file into the staging area, but for what an earlier run has left there; how they were
        written."""
        plan, workers = self.plan, self.plan.figures.workers
        self._recovered = recover(plan.shards, self.directory.run, self.directory.path, workers, self._reread)
        there = self._recovered.blocks
        self.progress(Event("start", plan.figures.write, count=len(plan.shards)))
        if there:
            spans = (block_range(block, plan.shards[number].size) for number, block in there)
            self.progress(Event("resume", sum(end - start for start, end in spans), count=len(there)))
        told = Told(lambda count: self.progress(Event("bytes", count)), self._wrote_file)
        sink = ShardSink(
            plan.shards, self.directory.run, options.io, buffer_count(workers), told, self._recovered.files
        )
        stream = Stream(plan, self.inputs, device_of(options.device))
        self._files, self._stats = stream.into(sink, there), stream.stats
        return sink.io

    def _reread(self, count: int, total: int) -> None:
        self.progress(Event("bytes", count) if count else Event("reread", total))

    def _wrote_file(self, shard: OutputShard) -> None:
        if self._hashes:
            self._hashes.add(shard.file, self._published.get(shard.file, self.directory.run / shard.file))
        with self._lock:
            self._finished += 1
            event = Event("shard", shard.size, shard.file, self._finished, len(self.plan.shards))
        self.progress(event)

    def publish(self, fingerprint: str) -> dict[str, Any]:
        """Copy sidecars, move everything into place, write the completion marker."""
        self.progress(Event("publish"))
        plan, directory = self.plan, self.directory
        sidecars = {}
        for sidecar in plan.sidecars:
            size, blocks = copy_file(sidecar.path, directory.run, sidecar.name)
            sidecars[sidecar.name] = WrittenFile(size, tuple(blocks))
            if self._hashes:
                self._hashes.add(sidecar.name, directory.run / sidecar.name)
        late = {name: data for name, data in ((INDEX, plan.index), (CONFIG, plan.config)) if data is not None}
        sums: dict[str, str] = {}
        if self._hashes:
            sums = self._hashes.results() | {name: hashlib.sha256(data).hexdigest() for name, data in late.items()}
            late = {SUMS: sums_of(sums), **late}
            sums[SUMS] = hashlib.sha256(late[SUMS]).hexdigest()
        for name, data in late.items():
            spans = [block_range(n, len(data)) for n in range(block_count(len(data)))]
            sidecars[name] = WrittenFile(len(data), tuple(block_digest([data[a:b]]) for a, b in spans))
        files = self._files
        if sums:
            files, sidecars = ({n: replace(f, sha256=sums[n]) for n, f in some.items()} for some in (files, sidecars))
        document = document_of(plan, fingerprint, self._stats, files, sidecars)
        late |= {INPUTS: strict_json.dumps(sealed(whereabouts(self.inputs))), MARKER: strict_json.dumps(document)}
        staged = [name for name in files if name not in self._published]
        directory.publish([*staged, *(sidecar.name for sidecar in plan.sidecars)], late)
        return document

    @property
    def _published(self) -> dict[str, Path]:
        """The weight files that an earlier run has put in place already."""
        kept = (found.path for found in self._recovered.files.values() if found.complete)
        return {path.name: path for path in kept if path.parent == self.directory.path}

    def give_up(self, error: BaseException) -> None:
        """Stop what goes on beside, and leave what the same command can go on with; nothing where it would meet the
        same refusal again, or where there is nothing yet."""
        if self._hashes:
            self._hashes.close()
        if not self.directory.alone or isinstance(error, OutputExistsError):
            return  # what is there may be another run's, which is about to finish it
        with contextlib.suppress(StreamMergeError):
            # What cannot be removed now stays behind as an unfinished run, which the next one goes on with.
            if isinstance(error, AdapterError) or not read_journal(self.directory.run):
                self.directory.abandon()
            else:
                self.directory.withdraw()


def base_files(checkpoint: Checkpoint) -> dict[str, list[int]]:
    """Size and time of modification of the base's files where they could change: a commit on the Hub cannot."""
    facts = checkpoint.facts
    shards = facts.shards if facts.identity == LOCAL else ()
    return {shard.file: [shard.state.size, shard.state.mtime_ns] for shard in shards}


def whereabouts(inputs: Inputs) -> dict[str, Any]:
    """Where a later command finds what went into an output."""
    return {
        "base": _where(inputs.checkpoint.facts.origin, inputs.checkpoint.facts.identity),
        "adapters": [_where(item.facts.root, item.facts.identity) for item in inputs.adapters],
        **({"rules": inputs.rules} if inputs.rules else {}),
    }


def _where(path: Path, identity: str) -> str:
    """Where a later `verify` finds an input: the commit on the Hub, or the absolute path."""
    return identity if identity != LOCAL else str(path.absolute())
