"""The library's front door. Silent, without exits, leaving the process as it was."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streammerge.compute.devices import device_of
from streammerge.compute.loading import load_in_background, wants_the_disk
from streammerge.core import io
from streammerge.core.errors import InputMissingError, UsageError
from streammerge.core.options import Options
from streammerge.core.text import count_text, some_of
from streammerge.execute import execute
from streammerge.inspection import AdapterStatus, inspect_adapter
from streammerge.integrity import WHOLE, Part, read_marker, verify_digests
from streammerge.planning.build import build_plan
from streammerge.planning.model import MergePlan
from streammerge.report import Report
from streammerge.sinks.directory import MARKER
from streammerge.sinks.records import read_inputs
from streammerge.sources.adapter import Adapter, open_adapter
from streammerge.sources.ahead import ReadAhead
from streammerge.sources.checkpoint import Checkpoint, open_checkpoint
from streammerge.standing import OutputStatus, status_of
from streammerge.stream import Event, Inputs, silent
from streammerge.verification import (
    DEFAULT_SAMPLE,
    Sample,
    check_after_run,
    check_earlier,
    verify_against,
)

PathLike = str | Path
Progress = Callable[[Event], None]


def merge(
    base: PathLike,
    adapters: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    weights: Sequence[float] | None = None,
    verify: bool = True,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Report:
    """Merge `adapters` into `base` and write the result to `output`.

    `base` and `adapters` are paths or Hub ids, `weights` one factor for each adapter (default 1), `options` the long
    options' names with underscores. `progress` is called with every `Event`; True shows the command line's bar.
    Raises a subclass of StreamMergeError for everything that is refused or fails, TypeError for an unknown option.
    """
    chosen = Options.of(options)
    with_bar = _progress(progress)
    checkpoint = open_checkpoint(str(base), chosen.read)
    begins = chosen.overwrite or not io.exists(Path(output) / MARKER)
    if begins:
        load_in_background()
    files = [shard.file for shard in checkpoint.facts.shards] if begins else []
    with ReadAhead(checkpoint.files, files, gently=wants_the_disk):
        inputs, plan = _prepare(checkpoint, adapters, weights, chosen)
        report = execute(plan, inputs, Path(output), chosen, with_bar)
        if report.status != "done":
            return check_earlier(report)
        if not verify:
            return report
        with_bar(Event("verify"))
        return check_after_run(plan, inputs, report, chosen.device)


def plan(
    base: PathLike, adapters: PathLike | Sequence[PathLike], *, weights: Sequence[float] | None = None, **options: Any
) -> MergePlan:
    """What `merge` would do with the same arguments, as a value. Raises like `merge`, writes nothing."""
    chosen = Options.of(options)
    return _prepare(open_checkpoint(str(base), chosen.read), adapters, weights, chosen)[1]


def inspect(adapter: PathLike, base: PathLike | None = None, **options: Any) -> AdapterStatus:
    """What is in an adapter, and, with a base, what it would touch there."""
    chosen = Options.of(options)
    checkpoint = open_checkpoint(str(base), chosen.read) if base is not None else None
    return inspect_adapter(open_adapter(str(adapter), chosen.read), checkpoint, chosen)


def verify(
    output: PathLike,
    *,
    base: PathLike | None = None,
    adapters: PathLike | Sequence[PathLike] | None = None,
    sample: float | None = None,
    full: bool = False,
    subset: tuple[int, int] | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Report:
    """Prove a finished output: its digests, and a `sample` (share of its blocks) or, with `full`, all of it derived
    again from base and adapters. Inputs that are not given are taken from where they were when the output was made;
    where they are gone, only the digests are checked and the report says so. With `subset=(i, n)` all that is done to
    the i-th of n parts of the blocks: n calls are one without.

    Raises VerificationError with every problem found, UnfinishedOutputError where there is nothing to verify, and
    InputMissingError where `sample` or `full` was asked for and the inputs are not there.
    """
    began = time.monotonic()
    path = Path(output)
    if sample is not None and not 0 < sample <= 1:
        raise UsageError(f"a sample of {sample:g} is not a share between 0 and 1")
    part = Part(*subset) if subset is not None else WHOLE
    document = read_marker(path)
    checked, beside = verify_digests(path, document, _progress(progress), part)
    about = _about(part, beside)
    texts, missing = _inputs_of(path, base, adapters, options.get("rules"))
    if texts is None:
        if full or sample is not None:
            raise InputMissingError(str(path), f"cannot be derived again: {missing}", "give `--base` and `--adapter`")
        notes = (*about, f"{missing}: digests were checked, nothing was derived again")
        return Report(path, document, "verified", time.monotonic() - began, checked, 0, notes=notes)
    chosen = Options.of({**document["options"], **options, "rules": texts[2]})
    weights = [item["weight"] for item in document["adapters"]]
    inputs, plan_again = _prepare(open_checkpoint(texts[0], chosen.read), texts[1], weights, chosen)
    again = Sample(1.0 if full else sample or DEFAULT_SAMPLE, part)
    rederived = verify_against(plan_again, inputs, path, document, again, chosen.device)
    return Report(path, document, "verified", time.monotonic() - began, checked, rederived, notes=about)


def status(output: PathLike) -> OutputStatus:
    """What an output directory holds, and what a run into it would do. Reads no weights."""
    return status_of(Path(output))


def _about(part: Part, beside: Sequence[str]) -> tuple[str, ...]:
    """What a verification did not look at."""
    notes = (f"this was part {part.number} of {part.count}: all {part.count} together are the whole output",)
    found = (f"{some_of(beside)}: not of this output, and not checked",) if beside else ()
    return (*(notes if part.count > 1 else ()), *found)


def _prepare(
    checkpoint: Checkpoint,
    adapters: PathLike | Sequence[PathLike],
    weights: Sequence[float] | None,
    options: Options,
) -> tuple[Inputs, MergePlan]:
    texts = [str(adapters)] if isinstance(adapters, str | Path) else [str(item) for item in adapters]
    factors = _weights(weights, len(texts))
    device_of(options.device)
    opened: list[Adapter] = [open_adapter(text, options.read) for text in texts]
    rules = str(Path(options.rules).absolute()) if options.rules else ""
    return Inputs(checkpoint, opened, rules), build_plan(checkpoint, opened, factors, options)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if count == 0:
        raise UsageError("no adapter was given")
    chosen = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(chosen) != count:
        raise UsageError(
            f"{count_text(len(chosen), 'weight')} given for {count_text(count, 'adapter')}",
            "one `--weight` for each adapter, in order",
        )
    if not all(math.isfinite(weight) for weight in chosen):
        raise UsageError("a weight is not finite")
    return chosen


def _inputs_of(
    output: Path, base: PathLike | None, adapters: PathLike | Sequence[PathLike] | None, rules: str | None
) -> tuple[tuple[str, list[str], str] | None, str]:
    """Base, adapters and table of rules to verify against; or None and why not."""
    recorded = read_inputs(output)
    texts = (
        None
        if adapters is None
        else [str(adapters)]
        if isinstance(adapters, str | Path)
        else [str(item) for item in adapters]
    )
    base_text = str(base) if base is not None else recorded["base"] if recorded else None
    adapter_texts = texts if texts is not None else recorded["adapters"] if recorded else None
    rules_text = rules if rules is not None else recorded.get("rules", "") if recorded else ""
    if base_text is None or adapter_texts is None:
        return None, "where base and adapters are is not recorded"
    if base is None and adapters is None:
        named = (base_text, *adapter_texts, rules_text)
        gone = [text for text in named if text.startswith("/") and not io.exists(text)]
        if gone:
            return None, f"`{gone[0]}`, which the output was made from, is gone"
    return (base_text, adapter_texts, rules_text), ""


def _progress(progress: Progress | bool | None) -> Progress:
    if progress is True:
        from streammerge.progress import Bar

        return Bar()
    return progress or silent
