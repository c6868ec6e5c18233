"""What an output directory holds, and what a run into it would do: for people who find one, and for scripts.

Reads names, headers, reports and what unfinished runs wrote down of themselves; no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.core import io
from streammerge.core.digests import block_count, block_range
from streammerge.core.errors import VerificationError
from streammerge.core.locks import lock
from streammerge.core.text import printable, size_text
from streammerge.integrity import verify_but_weights
from streammerge.sinks.directory import LOCK, STAGING, OutputDirectory, State
from streammerge.sinks.journal import read_journal
from streammerge.sinks.records import read_inputs

STATUS_VERSION = 1
NEXT = {
    State.EMPTY: "a run begins",
    State.FINISHED: "the same merge is told that it is complete, any other is refused without `--overwrite`",
    State.UNFINISHED: "the same merge goes on, any other is refused without `--overwrite`",
    State.FOREIGN: "every run is refused",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """One merge in an output: its fingerprint, what it was made from, and how many of its bytes are written down as
    durable."""

    fingerprint: str
    base: str
    adapters: tuple[str, ...]
    written: int
    size: int


@dataclass(frozen=True, slots=True)
class OutputStatus:
    """What `output` holds. `at_work` says that another process holds its lock; the finished result comes first in
    `merges`, unfinished runs follow; `problems` are what is wrong with a finished result, its tensors not looked at."""

    output: Path
    state: State
    at_work: bool
    merges: tuple[Standing, ...]
    problems: tuple[str, ...] = ()

    @property
    def next(self) -> str:
        """What a run into it would do."""
        return "every run is refused without `--overwrite`" if self.problems else NEXT[self.state]

    def as_data(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        merges = [
            {
                "fingerprint": merge.fingerprint,
                "base": merge.base,
                "adapters": list(merge.adapters),
                "written_bytes": merge.written,
                "bytes": merge.size,
            }
            for merge in self.merges
        ]
        state = self.state.name.lower()
        data = {"version": STATUS_VERSION, "output": str(self.output), "state": state, "at_work": self.at_work}
        return {**data, "next": self.next, "merges": merges, "problems": list(self.problems)}

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.state.value}"]
        for merge in self.merges:
            done = f"{size_text(merge.written)} of {size_text(merge.size)} written"
            adapters = ", ".join(printable(adapter) for adapter in merge.adapters)
            lines.append(f"  {adapters} into {printable(merge.base)}: {done}")
        lines += [f"  damaged: {line}" for line in VerificationError(str(self.output), self.problems).details()]
        if self.at_work:
            lines.append("  a run is at work on it now")
        return "\n".join([*lines, f"  next: {self.next}"])


def status_of(output: Path) -> OutputStatus:
    """Look at an output directory, finished, unfinished or not there. Raises OutputExistsError for a report that cannot
    be read."""
    directory = OutputDirectory(output)
    state = directory.state()
    merges = []
    if state is State.FINISHED:
        report = directory.marker()
        size = sum(int(entry["size"]) for entry in report["files"].values())
        merges.append(_standing(report, read_inputs(output) or {}, size, size))
    for folder, run in directory.runs().items():
        sizes = run.get("sizes") or []
        spans = (block_range(block, sizes[n]) for n, block in read_journal(folder) if _known(sizes, n, block))
        merges.append(_standing(run, run.get("inputs") or {}, sum(end - start for start, end in spans), sum(sizes)))
    problems = _problems(output) if state is State.FINISHED else ()
    return OutputStatus(output, state, _is_locked(output), tuple(merges), problems)


def _problems(output: Path) -> tuple[str, ...]:
    try:
        verify_but_weights(output)
    except VerificationError as error:
        return error.problems
    return ()


def _standing(origin: Mapping[str, Any], inputs: Mapping[str, Any], written: int, size: int) -> Standing:
    """A merge, its inputs by where they were, or by their ids where that is not known."""
    adapters = inputs.get("adapters") or [item.get("id", "?") for item in origin.get("adapters") or ()]
    base = inputs.get("base") or (origin.get("base") or {}).get("id", "?")
    return Standing(origin["fingerprint"], base, tuple(adapters), written, size)


def _known(sizes: list[int], number: int, block: int) -> bool:
    return 0 <= number < len(sizes) and 0 <= block < block_count(sizes[number])


def _is_locked(output: Path) -> bool:
    path = output / STAGING / LOCK
    if not io.exists(path):
        return False
    held = lock(path)
    if held is not None:
        held.close()
    return held is None
