"""Proving an output against the inputs it was made from: blocks derived again from base and adapters, a sample or all
of them. What the report alone proves is `integrity`'s. Problems are collected and raised together.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streammerge.compute.devices import device_of
from streammerge.compute.produce import Producer
from streammerge.core import io, strict_json
from streammerge.core.digests import block_count, block_range
from streammerge.core.errors import (
    InputError,
    InputMissingError,
    OutputExistsError,
    UnfinishedOutputError,
    VerificationError,
)
from streammerge.core.text import some_of
from streammerge.execute import fingerprint_of
from streammerge.integrity import (
    WHOLE,
    Findings,
    NamedBlock,
    Part,
    check_block,
    check_listing,
    check_structure,
    verify_but_weights,
)
from streammerge.planning.model import MergePlan
from streammerge.report import Report, origin_of
from streammerge.sinks.directory import MARKER
from streammerge.sinks.records import told_apart
from streammerge.stream import Inputs, derived_digest, run_jobs

DEFAULT_SAMPLE = 0.05
"""Share of the blocks that is derived again unless the caller says otherwise."""
SAMPLE_AFTER_RUN = 0.02
"""The same right after a run, which reads them back from the disk as well: two percent of the time, not ten."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What is derived again: a share of the weight files' blocks in one part of an output."""

    share: float = DEFAULT_SAMPLE
    part: Part = WHOLE


def verify_against(
    plan: MergePlan, inputs: Inputs, output: Path, document: Mapping[str, Any], sample: Sample, device: str = "auto"
) -> int:
    """Derive a sample of the blocks again on a device and compare; the number of blocks derived.

    Raises VerificationError, also where plan or base are not those of the report.
    """
    findings = Findings(output)
    if document["plan"] != plan.digest():
        findings.problems.append(f"the output was made from another {told_apart(document, origin_of(plan))}")
    elif document["fingerprint"] != fingerprint_of(plan, inputs.checkpoint):
        findings.problems.append("the base's weights are not those the output was made from")
    findings.raise_if_any()
    jobs = sampled_blocks(plan, sample.share, document["fingerprint"], sample.part.of(document))
    _derive(Producer(plan, inputs.checkpoint, inputs.adapters, device=device_of(device)), document, jobs, findings)
    findings.raise_if_any()
    return len(jobs)


def _derive(
    producer: Producer,
    document: Mapping[str, Any],
    jobs: Sequence[tuple[int, int]],
    findings: Findings,
    *,
    read_back: bool = False,
) -> None:
    """Derive blocks again on all workers and compare them with the report; with `read_back`, what is on disk too."""
    plan = producer.plan
    stop = threading.Event()

    def work(job: tuple[int, int]) -> None:
        number, block = job
        shard = plan.shards[number]
        entry = document["files"][shard.file]
        if read_back:
            check_block(shard.file, entry, block, findings)
        if derived_digest(producer, number, block, stop) != entry["blocks"][block]:
            start, end = block_range(block, shard.size)
            findings.problems.append(f"`{shard.file}` bytes {start:,} to {end:,} are not what base and adapters give")

    with producer.threads.kept():
        run_jobs(jobs, work, plan.figures.workers, stop)


def check_after_run(plan: MergePlan, inputs: Inputs, report: Report, device: str = "auto") -> Report:
    """The check that follows a run: structure, coverage, and a sample of blocks read back and derived again.

    Raises VerificationError, or OutputExistsError where another run has replaced the result meanwhile."""
    with _unless_replaced(report):
        return _check_after_run(plan, inputs, report, device)


def check_earlier(report: Report) -> Report:
    """The check of a result that an earlier run has left: all of it but the bytes of its tensors.

    Raises like `check_after_run`."""
    began = time.monotonic()
    with _unless_replaced(report):
        document = verify_but_weights(report.output)
    return replace(report, document=document, seconds=report.seconds + time.monotonic() - began)


@contextlib.contextmanager
def _unless_replaced(report: Report) -> Iterator[None]:
    """While the result of a run is looked at: what is wrong there is not its fault where another run's is there now."""
    try:
        yield
    except (VerificationError, UnfinishedOutputError, InputError):
        if _is_in_place(report):
            raise
        reason = f"another run is at work on `{report.output}`: it has replaced this result while it was checked"
        raise OutputExistsError(reason, "choose another `--output`") from None


def _is_in_place(report: Report) -> bool:
    """Whether the report in an output is the one of this run, as far as that can be told."""
    try:
        path = report.output / MARKER
        return strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path)) == report.document
    except InputMissingError:
        return False
    except InputError:
        return True


def _check_after_run(plan: MergePlan, inputs: Inputs, report: Report, device: str) -> Report:
    began = time.monotonic()
    findings = Findings(report.output)
    document = report.document
    check_listing(report.output, document, findings)
    check_structure(report.output, document, findings)
    names = {tensor for shard in plan.shards for tensor in shard.offsets}
    if names != set(plan.tensors):
        findings.problems.append(f"the files do not hold {some_of(set(plan.tensors) - names)}")
    if document["fingerprint"] != fingerprint_of(plan, inputs.checkpoint):
        findings.problems.append("the base's weights are not those the output was made from")
    findings.raise_if_any()
    jobs = sampled_blocks(plan, SAMPLE_AFTER_RUN, document["fingerprint"])
    producer = Producer(plan, inputs.checkpoint, inputs.adapters, device=device_of(device))
    _derive(producer, document, jobs, findings, read_back=True)
    findings.raise_if_any()
    seconds = report.seconds + time.monotonic() - began
    return replace(report, seconds=seconds, checked=len(jobs), rederived=len(jobs))


def sampled_blocks(
    plan: MergePlan, share: float, seed: str, among: Collection[NamedBlock] | None = None
) -> list[tuple[int, int]]:
    """A share of all blocks as (shard, block), or of those `among` them, at least one where there is any, evenly
    spread; which ones follows from `seed`."""
    blocks = [
        (number, block)
        for number, shard in enumerate(plan.shards)
        for block in range(block_count(shard.size))
        if among is None or (shard.file, block) in among
    ]
    step = max(1, round(1 / share)) if share < 1 else 1
    first = int(seed[:8], 16) % min(step, len(blocks)) if blocks else 0
    return blocks[first::step]
