"""What runs and reports say of themselves: whose an output is, which files belong to it, what tells it from another.

Records are read as they lie in the output, where anybody may have changed them: nothing here follows a name in one, and
what is not of the kind that we write there is found before anything is looked up in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.digests import is_sealed
from streammerge.core.errors import InputError, InputMissingError, MalformedInputError
from streammerge.core.text import some_of

INPUTS = ".streammerge-inputs.json"
"""Beside a report: where base and adapters were."""
RUN = "run.json"
"""In the folder of a run: which plan and inputs it belongs to, and the files it would write."""

_EACH = "*"
"""Stands for every name that an object has."""
_NUMBER = int | float
_ORIGIN = {
    "fingerprint": str,
    "arithmetic": int,
    "plan": str,
    "base": {"id": str, "digest": str},
    "adapters": [{"id": str, "digest": str, "weight": _NUMBER}],
    "options": dict,
}
_INPUTS = {"base": str, "adapters": [str], "rules": str}
_FILES = {_EACH: {"size": int, "blocks": [str]}}
_REPORT = {
    **_ORIGIN,
    "tensors": {_EACH: {"dtype": str, "shape": [int]}},
    "files": _FILES,
    "sidecars": _FILES,
    "code": [str],
}
_RUN = {
    **_ORIGIN,
    "files": [str],
    "sizes": [int],
    "inputs": _INPUTS,
    "base_files": {_EACH: [int]},
}
"""What stands in a report and in the record of a run, as far as somebody looks at it: a kind, a list of one kind, or an
object by its names."""


def read_inputs(output: Path) -> dict[str, Any] | None:
    """Where `base`, `adapters` and perhaps a table of `rules` were when a result was made, None where that was not
    written down or somebody has damaged it."""
    path = output / INPUTS
    if not io.exists(path):
        return None
    try:
        inputs = strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
    except InputError:
        return None
    return inputs if {"base", "adapters"} <= inputs.keys() and _has(inputs, _INPUTS, whole=False) else None


def malformed_part(report: Mapping[str, Any]) -> str | None:
    """The first part of a report that is missing or not of the kind that we write, None for one that is whole."""
    for name, shape in _REPORT.items():
        if name not in report or not _has(report[name], shape, whole=True):
            return name
    return None if report["adapters"] else "adapters"


def _has(value: Any, shape: Any, *, whole: bool) -> bool:
    """Whether a value is of a shape; `whole` says that everything the shape names has to be there."""
    if isinstance(shape, list):
        return isinstance(value, list) and all(_has(item, shape[0], whole=whole) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape) and not isinstance(value, bool)
    if not isinstance(value, dict):
        return False
    if _EACH in shape:
        return all(_has(item, shape[_EACH], whole=whole) for item in value.values())
    return all(_has(value[name], of, whole=whole) if name in value else not whole for name, of in shape.items())


def read_run(folder: Path) -> dict[str, Any] | None:
    """What a run wrote down of itself; None where it never came to that, or somebody has damaged it."""
    path = folder / RUN
    try:
        data = io.read_file(path, strict_json.MAX_BYTES)
        run = strict_json.loads(data, str(path))
    except (InputMissingError, MalformedInputError):
        return None
    return run if is_sealed(run, data) and "fingerprint" in run and _has(run, _RUN, whole=False) else None


def changed_files(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """The weight files of the base that changed since a run began, for a sentence."""
    then, now = (run.get("base_files") or {} for run in (theirs, ours))
    changed = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    return f"base: {some_of(changed, 3)} changed since it began (size or time of modification)"


def files_of(result: Mapping[str, Any]) -> list[str]:
    """The files that a report or a run names."""
    return [*map(str, result.get("files") or ()), *map(str, result.get("sidecars") or ())]


def told_apart(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What two merges differ in, by what their reports, or runs, say of their origin."""

    def digests(origin: Mapping[str, Any], *names: str) -> list[Any]:
        return [[item.get(name) for name in names] for item in origin.get("adapters") or []]

    def base(origin: Mapping[str, Any]) -> Any:
        return (origin.get("base") or {}).get("digest")

    pairs = {
        "base": (base(theirs), base(ours)),
        "adapter": (digests(theirs, "digest"), digests(ours, "digest")),
        "weight of an adapter": (digests(theirs, "weight"), digests(ours, "weight")),
        "arithmetic version": (theirs.get("arithmetic"), ours.get("arithmetic")),
    }
    found = [name for name, (their, our) in pairs.items() if their != our]
    their_options, our_options = (origin.get("options") or {} for origin in (theirs, ours))
    for name in sorted({*their_options, *our_options}):
        there, here = their_options.get(name), our_options.get(name)
        if there != here:
            found.append(f"`--{name.replace('_', '-')}` ({there} there, {here} here)")
    if not found and theirs.get("plan") == ours.get("plan"):
        return "content of the base's weights"
    return ", ".join(found) or "plan"
