"""What runs and reports say of themselves: whose an output is, which files belong to it, what tells it from another.

Records are read as they lie in the output, where anybody may have changed them: nothing here follows a name in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.digests import is_sealed
from streammerge.core.errors import InputMissingError, MalformedInputError
from streammerge.core.text import some_of

RUN = "run.json"
"""In the folder of a run: which plan and inputs it belongs to, and the files it would write."""


def read_run(folder: Path) -> dict[str, Any] | None:
    """What a run wrote down of itself; None where it never came to that, or somebody has damaged it."""
    path = folder / RUN
    try:
        data = io.read_file(path, strict_json.MAX_BYTES)
        run = strict_json.loads(data, str(path))
    except (InputMissingError, MalformedInputError):
        return None
    return run if is_sealed(run, data) and isinstance(run.get("fingerprint"), str) else None


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
        listed = origin.get("adapters") or []
        return [[item.get(name) for name in names] for item in listed if isinstance(item, dict)]

    def base(origin: Mapping[str, Any]) -> Any:
        found = origin.get("base")
        return found.get("digest") if isinstance(found, dict) else None

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
