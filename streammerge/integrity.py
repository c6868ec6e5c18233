"""What a report alone proves of an output: the structure, every digest, and the files that are there.

Nothing is asked of the inputs. Every bit of every file that a loader may look at is under some digest: weights and
sidecars under those of the report, the report and the record of the inputs under their own. Problems are collected and
raised together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.digests import block_count, block_digest, block_range, is_sealed
from streammerge.core.errors import (
    InputError,
    InputMissingError,
    InputReadError,
    MalformedInputError,
    UnfinishedOutputError,
    UnsafeInputError,
    UsageError,
    VerificationError,
)
from streammerge.core.options import Options
from streammerge.core.text import some_of
from streammerge.formats.filenames import SAFETENSORS_INDEX, is_beside_a_checkpoint
from streammerge.formats.index import check_index, parse_index
from streammerge.formats.safetensors import read_header
from streammerge.planning.memory import PIECE
from streammerge.sinks.directory import MARKER, STAGING
from streammerge.sinks.records import INPUTS, malformed_part
from streammerge.stream import Event, Progress, silent

NamedBlock = tuple[str, int]
"""A file of an output and a block of it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of `count` parts of an output's blocks, counted from 1. Together they are all blocks, and no two share one.
    Raises UsageError for a part that there is not."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            reason = f"part {self.number} of {self.count} is none"
            raise UsageError(reason, "parts are counted from 1: 1/5, 2/5, 3/5, 4/5 and 5/5 are all of five")

    def of(self, document: Mapping[str, Any]) -> set[NamedBlock]:
        """The blocks of this part, of all those that a report names."""
        listed = _listed(document).items()
        blocks = [(name, block) for name, entry in listed for block in range(block_count(entry["size"]))]
        return set(blocks[self.number - 1 :: self.count])


WHOLE = Part()


@dataclass(slots=True)
class Findings:
    """What was looked at in an output, and what is wrong with it."""

    output: Path
    problems: list[str] = field(default_factory=list)
    checked: int = 0

    def raise_if_any(self) -> None:
        """Raise VerificationError with all problems, if there are any."""
        if self.problems:
            raise VerificationError(str(self.output), tuple(self.problems))


def read_marker(output: Path) -> dict[str, Any]:
    """The report of a finished output. Raises UnfinishedOutputError where there is none, VerificationError where it is
    not what was written, to the byte."""
    path = output / MARKER
    if not io.exists(path):
        if not io.exists(output):
            raise UnfinishedOutputError(f"`{output}` does not exist: there is nothing to verify")
        reason = f"`{output}` holds no `{MARKER}`: it is not a finished output of streammerge"
        begun = io.exists(output / STAGING)
        raise UnfinishedOutputError(reason, "finish it with the command that began it" if begun else "")
    try:
        data = _read(path)
        document = strict_json.loads(data, str(path))
    except InputReadError:
        raise
    except InputError as error:
        raise VerificationError(str(output), (str(error),)) from None
    if not is_sealed(document, data) or document.get("streammerge") != 1:
        raise VerificationError(
            str(output), (f"`{MARKER}` was changed after it was written: its own digest does not fit",)
        )
    if problem := _unusable(document):
        raise VerificationError(str(output), (f"`{MARKER}` is no report of this version: {problem}",))
    return document


def _unusable(document: Mapping[str, Any]) -> str:
    """What keeps an intact report from being one of ours, empty for nothing."""
    if part := malformed_part(document):
        return f"it has no usable `{part}`"
    if unknown := sorted(document["options"].keys() - {item.name for item in fields(Options)}):
        return f"it names {some_of(unknown)} as an option"
    try:
        Options.of(document["options"])
    except UsageError as error:
        return error.summary()
    return ""


def verify_digests(
    output: Path, document: Mapping[str, Any], progress: Progress = silent, part: Part = WHOLE
) -> tuple[int, tuple[str, ...]]:
    """Check the structure of a finished output, and the digests of every block in `part`; how many blocks that were,
    and the files that were found besides and left alone.

    Raises VerificationError with all problems.
    """
    return _verify(output, document, part.of(document), progress)


def verify_but_weights(output: Path) -> dict[str, Any]:
    """The report of a finished output, after a look at everything but its tensors: which files are there, their sizes,
    whether headers, index and report agree, and the digests of all that holds no weights. Milliseconds, where
    `verify_digests` reads it all. Raises like `read_marker` and `verify_digests`."""
    document = read_marker(output)
    sidecars = document["sidecars"].items()
    blocks = {(name, block) for name, entry in sidecars for block in range(block_count(entry["size"]))}
    _verify(output, document, blocks, silent)
    return document


def _verify(
    output: Path, document: Mapping[str, Any], blocks: Collection[NamedBlock], progress: Progress
) -> tuple[int, tuple[str, ...]]:
    findings = Findings(output)
    listed = _listed(document)
    progress(Event("verify", sum(_size(block, listed[name]["size"]) for name, block in blocks)))
    beside = check_listing(output, document, findings)
    check_structure(output, document, findings)
    _check_record(output, findings)
    for name, entry in listed.items():
        if io.exists(output / name):
            wanted = sorted(block for file, block in blocks if file == name)
            _check_file(name, entry, wanted, findings, progress)
    findings.raise_if_any()
    return findings.checked, beside


def _read(path: Path) -> bytes:
    """A small file of an output. InputReadError is what the system refuses, and says nothing of what is in it."""
    size = io.size_of(path)
    if size > strict_json.MAX_BYTES:
        raise MalformedInputError(str(path), f"{size:,} bytes, at most {strict_json.MAX_BYTES:,} are read")
    return io.read_file(path, strict_json.MAX_BYTES)


def _listed(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {**document["files"], **document["sidecars"]}


def _size(block: int, size: int) -> int:
    start, end = block_range(block, size)
    return end - start


def check_listing(output: Path, document: Mapping[str, Any], findings: Findings) -> tuple[str, ...]:
    """Files that the report names must be there, and no others but those that mean nothing to a loader: which."""
    # A dangling link is listed, and is nothing.
    there = {name for name in io.list_tree(output) if not name.startswith(f"{STAGING}/") and io.exists(output / name)}
    listed = _listed(document).keys()
    findings.problems += [f"`{name}` is missing" for name in sorted(listed - there)]
    extra = sorted(there - listed - {MARKER, INPUTS})
    findings.problems += [
        f"`{name}` is not a file of this output" for name in extra if not is_beside_a_checkpoint(name)
    ]
    return tuple(name for name in extra if is_beside_a_checkpoint(name))


def check_structure(output: Path, document: Mapping[str, Any], findings: Findings) -> None:
    """Every header parses, and the index says what the headers say; where a weight file is missing, no more is said."""
    if not all(io.exists(output / name) for name in document["files"]):
        return
    try:
        headers = {name: read_header(output / name, name).tensors for name in document["files"]}
        path = output / SAFETENSORS_INDEX
        if io.exists(path):
            check_index(parse_index(_read(path), str(path)), headers, str(path))
    except InputReadError:
        raise
    except InputError as error:
        findings.problems.append(error.summary())
        return
    found = {info.name: (info.dtype, list(info.shape)) for tensors in headers.values() for info in tensors}
    for name, entry in document["tensors"].items():
        if found.get(name) != (entry["dtype"], entry["shape"]):
            findings.problems.append(
                f"tensor `{name}` is {found.get(name, 'missing')}, the report says {entry['dtype']} {entry['shape']}"
            )


def _check_record(output: Path, findings: Findings) -> None:
    """The record of the inputs, where there is one, must be as it was written."""
    path = output / INPUTS
    if not io.exists(path):
        return
    try:
        data = _read(path)
        intact = is_sealed(strict_json.loads(data, str(path)), data)
    except InputReadError:
        raise
    except InputError:
        intact = False
    if not intact:
        advice = "remove it, and say where the inputs are with `--base` and `--adapter`"
        findings.problems.append(f"`{INPUTS}` was changed after it was written; {advice}")


def _check_file(
    name: str, entry: Mapping[str, Any], blocks: Collection[int], findings: Findings, progress: Progress
) -> None:
    path = findings.output / name
    try:
        size = io.size_of(path)
        if size != entry["size"] or len(entry["blocks"]) != block_count(size):
            findings.problems.append(f"`{name}` has {size:,} bytes, the report says {entry['size']:,}")
            return
        for block in blocks:
            check_block(name, entry, block, findings)
            progress(Event("bytes", _size(block, size)))
    except UnsafeInputError as error:
        findings.problems.append(error.summary())
    except InputMissingError:
        findings.problems.append(f"`{name}` is missing")


def check_block(name: str, entry: Mapping[str, Any], block: int, findings: Findings) -> None:
    """Read a block of a file and compare it with the digest that the report has for it."""
    start, end = block_range(block, entry["size"])
    findings.checked += 1
    if block_digest(_pieces(findings.output / name, start, end)) != entry["blocks"][block]:
        findings.problems.append(f"`{name}` differs from what was written, within bytes {start:,} to {end:,}")


def _pieces(path: Path, start: int, end: int) -> Iterator[bytearray]:
    fd = io.open_input(path)
    try:
        for first in range(start, end, PIECE):
            yield io.read_at(fd, str(path), first, min(PIECE, end - first))
    finally:
        io.close(fd)
