"""Proving an output against its report, and against the inputs it was made from.

Three levels: the structure (marker, files, headers, index agree), the digests of every block of every file, and blocks
derived again from base and adapters: a sample, or all of them. Problems are collected and raised together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streammerge.compute.devices import device_of
from streammerge.compute.produce import Producer
from streammerge.core import io, strict_json
from streammerge.core.digests import block_count, block_digest, block_range
from streammerge.core.errors import InputError, StreamMergeError, UnfinishedOutputError, VerificationError
from streammerge.core.text import some_of
from streammerge.execute import fingerprint_of
from streammerge.formats.filenames import SAFETENSORS_INDEX
from streammerge.formats.index import check_index, parse_index
from streammerge.formats.safetensors import read_header
from streammerge.planning.memory import PIECE
from streammerge.planning.model import MergePlan
from streammerge.report import Report, malformed_part, origin_of, own_digest
from streammerge.sinks.directory import INPUTS, MARKER, STAGING, told_apart
from streammerge.stream import Event, Inputs, Progress, derived_digest, run_jobs, silent

DEFAULT_SAMPLE = 0.05
"""Share of the blocks that is derived again unless the caller says otherwise."""
SAMPLE_AFTER_RUN = 0.02
"""The same right after a run, which reads them back from the disk as well: two percent of the time, not ten."""


@dataclass(slots=True)
class _Findings:
    output: Path
    problems: list[str] = field(default_factory=list)
    checked: int = 0
    rederived: int = 0

    def raise_if_any(self) -> None:
        if self.problems:
            raise VerificationError(str(self.output), tuple(self.problems))


def read_marker(output: Path) -> dict[str, Any]:
    """The report of a finished output. Raises UnfinishedOutputError where there is none, VerificationError where it is
    not what was written."""
    path = output / MARKER
    if not io.exists(path):
        if not io.exists(output):
            raise UnfinishedOutputError(f"`{output}` does not exist: there is nothing to verify")
        reason = f"`{output}` holds no `{MARKER}`: it is not a finished output of streammerge"
        begun = io.exists(output / STAGING)
        raise UnfinishedOutputError(reason, "finish it with the command that began it" if begun else "")
    try:
        document = strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
        intact = document.get("digest") == own_digest(document)
    except StreamMergeError as error:
        raise VerificationError(str(output), (str(error),)) from None
    if not intact or document.get("streammerge") != 1:
        raise VerificationError(
            str(output), (f"`{MARKER}` was changed after it was written: its own digest does not fit",)
        )
    part = malformed_part(document)
    if part:
        raise VerificationError(str(output), (f"`{MARKER}` is no report of ours: it has no usable `{part}`",))
    return document


def recorded_inputs(output: Path) -> tuple[str, list[str], str] | None:
    """Where base, adapters and a table of rules (or nothing) were when the output was made, if that was recorded and
    makes sense."""
    path = output / INPUTS
    if not io.exists(path):
        return None
    try:
        data = strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
    except InputError:
        return None
    base, adapters, rules = data.get("base"), data.get("adapters"), data.get("rules", "")
    if (
        not isinstance(base, str)
        or not isinstance(rules, str)
        or not isinstance(adapters, list)
        or not all(isinstance(item, str) for item in adapters)
    ):
        return None
    return base, adapters, rules


def verify_digests(output: Path, document: Mapping[str, Any], progress: Progress = silent) -> int:
    """Check structure and every digest of a finished output; the number of blocks checked.

    Raises VerificationError with all problems.
    """
    findings = _Findings(output)
    listed: dict[str, Mapping[str, Any]] = {**document["files"], **document["sidecars"]}
    progress(Event("verify", sum(entry["size"] for entry in listed.values())))
    _check_listing(output, document, findings)
    _check_structure(output, document, findings)
    for name, entry in listed.items():
        if io.exists(output / name):
            _check_blocks(output / name, name, entry, findings, progress)
    findings.raise_if_any()
    return findings.checked


def verify_against(
    plan: MergePlan, inputs: Inputs, output: Path, document: Mapping[str, Any], share: float, device: str = "auto"
) -> int:
    """Derive a share of the blocks again on a device and compare; the number of blocks derived.

    Raises VerificationError, also where plan or base are not those of the report.
    """
    findings = _Findings(output)
    if document["plan"] != plan.digest():
        findings.problems.append(f"the output was made from another {told_apart(document, origin_of(plan))}")
    elif document["fingerprint"] != fingerprint_of(plan, inputs.checkpoint):
        findings.problems.append("the base's weights are not those the output was made from")
    findings.raise_if_any()
    jobs = sampled_blocks(plan, share, document["fingerprint"])
    _derive(Producer(plan, inputs.checkpoint, inputs.adapters, device=device_of(device)), document, jobs, findings)
    findings.raise_if_any()
    return len(jobs)


def _derive(
    producer: Producer,
    document: Mapping[str, Any],
    jobs: Sequence[tuple[int, int]],
    findings: _Findings,
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
            _check_block(findings.output / shard.file, shard.file, entry, block, findings)
        if derived_digest(producer, number, block, stop) != entry["blocks"][block]:
            start, end = block_range(block, shard.size)
            findings.problems.append(f"`{shard.file}` bytes {start:,} to {end:,} are not what base and adapters give")

    with producer.threads.kept():
        run_jobs(jobs, work, plan.figures.workers, stop)


def check_after_run(plan: MergePlan, inputs: Inputs, report: Report, device: str = "auto") -> Report:
    """The check that follows a run: structure, coverage, and a sample of blocks read back and derived again."""
    began = time.monotonic()
    findings = _Findings(report.output)
    document = report.document
    _check_listing(report.output, document, findings)
    _check_structure(report.output, document, findings)
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


def sampled_blocks(plan: MergePlan, share: float, seed: str) -> list[tuple[int, int]]:
    """A share of all blocks as (shard, block), at least one, evenly spread; which ones follows from `seed`."""
    blocks = [(number, block) for number, shard in enumerate(plan.shards) for block in range(block_count(shard.size))]
    step = max(1, round(1 / share)) if share < 1 else 1
    first = int(seed[:8], 16) % min(step, len(blocks)) if blocks else 0
    return blocks[first::step]


def _check_listing(output: Path, document: Mapping[str, Any], findings: _Findings) -> None:
    """Files the report names must be there; weight files it does not name must not."""
    there = set(io.list_tree(output))
    listed = {*document["files"], *document["sidecars"]}
    findings.problems += [f"`{name}` is missing" for name in sorted(listed - there)]
    foreign = [
        name for name in sorted(there - listed) if name.endswith((".safetensors", ".safetensors.index.json", ".bin"))
    ]
    findings.problems += [f"`{name}` is not a file of this output" for name in foreign]


def _check_structure(output: Path, document: Mapping[str, Any], findings: _Findings) -> None:
    """Every header parses, and the index says what the headers say."""
    try:
        headers = {
            name: read_header(output / name, name).tensors for name in document["files"] if io.exists(output / name)
        }
        path = output / SAFETENSORS_INDEX
        if io.exists(path):
            check_index(parse_index(io.read_file(path, strict_json.MAX_BYTES), str(path)), headers, str(path))
    except StreamMergeError as error:
        findings.problems.append(error.summary())
        return
    found = {info.name: (info.dtype, list(info.shape)) for tensors in headers.values() for info in tensors}
    for name, entry in document["tensors"].items():
        if found.get(name) != (entry["dtype"], entry["shape"]):
            findings.problems.append(
                f"tensor `{name}` is {found.get(name, 'missing')}, the report says {entry['dtype']} {entry['shape']}"
            )


def _check_blocks(path: Path, name: str, entry: Mapping[str, Any], findings: _Findings, progress: Progress) -> None:
    size = io.size_of(path)
    if size != entry["size"] or len(entry["blocks"]) != block_count(size):
        findings.problems.append(f"`{name}` has {size:,} bytes, the report says {entry['size']:,}")
        return
    for block in range(block_count(size)):
        _check_block(path, name, entry, block, findings)
        start, end = block_range(block, size)
        progress(Event("bytes", end - start))


def _check_block(path: Path, name: str, entry: Mapping[str, Any], block: int, findings: _Findings) -> None:
    start, end = block_range(block, entry["size"])
    findings.checked += 1
    if block_digest(_pieces(path, start, end)) != entry["blocks"][block]:
        findings.problems.append(f"`{name}` differs from what was written, within bytes {start:,} to {end:,}")


def _pieces(path: Path, start: int, end: int) -> Iterator[bytearray]:
    fd = io.open_input(path)
    try:
        for first in range(start, end, PIECE):
            yield io.read_at(fd, str(path), first, min(PIECE, end - first))
    finally:
        io.close(fd)
