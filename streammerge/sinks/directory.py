"""The output directory: what is there, whether a run may use it, and how a result is published in it.

The commit protocol: everything is written below `.streammerge/`, synced, then renamed into place in the order shards,
sidecars, index, config.json, report. The report is the completion marker: a directory without it is unfinished, and
one without config.json or index is nothing that a loader takes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.errors import InputMissingError, MalformedInputError, OutputExistsError, StreamMergeError
from streammerge.core.text import some_of

STAGING = ".streammerge"
MARKER = "streammerge.json"
INPUTS = ".streammerge-inputs.json"
RUN = "run.json"
"""Below STAGING: which plan an unfinished run belongs to, and the files it would write."""
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LATE = (INDEX, CONFIG, MARKER)
"""The files that make a directory loadable, in the order in which they appear; removed in reverse."""


class State(Enum):
    """What a directory holds."""

    EMPTY = "nothing"
    FINISHED = "a finished result"
    UNFINISHED = "an unfinished run"
    FOREIGN = "files that are not ours"


class OutputDirectory:
    """One output directory, before and while something is written into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.staging = path / STAGING

    def state(self) -> State:
        """What is there now."""
        if not io.exists(self.path):
            return State.EMPTY
        if io.exists(self.path / MARKER):
            return State.FINISHED
        names = io.list_tree(self.path) if io.is_dir(self.path) else [self.path.name]
        if f"{STAGING}/{RUN}" in names:
            return State.UNFINISHED
        # A run that was killed before it wrote down its plan leaves a temporary file in the staging area, at most.
        return State.FOREIGN if any(not name.startswith(f"{STAGING}/") for name in names) else State.EMPTY

    def reclaimable(self) -> int:
        """Bytes of the result or the unfinished run that a run in its place removes."""
        if self.state() not in (State.FINISHED, State.UNFINISHED):
            return 0
        return sum(io.size_of(self.path / name) for name in io.list_tree(self.path))

    def refuse_inside(self, inputs: Sequence[Path]) -> None:
        """Refuse an output that is an input, lies in one, or holds one: a loader or a later run would mix them up."""
        here = self.path.resolve()
        for root in inputs:
            there = root.resolve()
            if here == there or here.is_relative_to(there) or there.is_relative_to(here):
                raise OutputExistsError(
                    f"the output `{self.path}` and the input `{root}` lie inside each other",
                    "choose another `--output`",
                )
        if any(parent.name.startswith("models--") for parent in (here, *here.parents)):
            raise OutputExistsError(f"the output `{self.path}` lies inside a Hub cache", "choose another `--output`")

    def claim(self, plan_digest: str, fingerprint: str, files: Sequence[str], *, overwrite: bool) -> bool:
        """Make the directory ready for a run of this plan; False if its finished result is already there.

        Raises OutputExistsError for anything that is not ours to touch. `fingerprint` identifies plan and inputs,
        `files` is everything the run will write.
        """
        state = self.state()
        before: list[str] = []
        if state is State.FINISHED:
            report = self._marker()
            if report.get("fingerprint") == fingerprint and not overwrite:
                self._clear_staging()
                return False
            if not overwrite:
                raise OutputExistsError(
                    f"`{self.path}` holds the finished result of another merge",
                    f"it was {_difference(report, plan_digest)}; choose another `--output`, or give `--overwrite`",
                )
            before = [*map(str, report.get("files", ())), *map(str, report.get("sidecars", ()))]
        elif state is State.UNFINISHED:
            run = self._run()
            if run.get("fingerprint") != fingerprint and not overwrite:
                raise OutputExistsError(
                    f"`{self.path}` holds an unfinished run of another merge",
                    "finish it with the command that began it, or replace it with `--overwrite`",
                )
            before = [*map(str, run.get("files", ()))]
        self._refuse_foreign(before)
        io.make_dirs(self.staging)
        # Written down before anything is removed: whenever this is cut short, the next run knows what is ours.
        run_file = {"fingerprint": fingerprint, "plan": plan_digest, "files": sorted({*before, *files})}
        self.put(RUN, strict_json.dumps(run_file), into=self.staging)
        self._remove(before)
        return True

    def _refuse_foreign(self, ours: Sequence[str]) -> None:
        """Raise OutputExistsError, before anything is touched, if there is a file that no run of ours put there."""
        hint = "choose an `--output` that is empty or does not exist"
        if io.exists(self.path) and not io.is_dir(self.path):
            raise OutputExistsError(f"the output `{self.path}` is not a directory", hint)
        known = {*ours, *LATE, INPUTS} if ours else set()
        there = io.list_tree(self.path) if io.exists(self.path) else []
        foreign = [name for name in there if name not in known and not name.startswith(f"{STAGING}/")]
        if foreign:
            raise OutputExistsError(f"`{self.path}` is not empty: it holds {some_of(foreign, 3)}", hint)

    def put(self, name: str, data: bytes, *, into: Path | None = None) -> None:
        """Write a small file durably and rename it to `name`, in the staging area or in place."""
        home = into or self.path
        temporary = self.staging / f"{name.rpartition('/')[2]}.{os.getpid()}.tmp"
        io.remove(temporary)
        io.write_new(temporary, data)
        if "/" in name:
            io.make_dirs((home / name).parent)
        io.rename(temporary, home / name)
        io.sync_dir((home / name).parent)

    def publish(self, staged: Sequence[str], late: Mapping[str, bytes]) -> None:
        """Move finished files from staging into place, then write the late files in their order, then tidy up."""
        for name in staged:
            if "/" in name:
                io.make_dirs((self.path / name).parent)
            io.rename(self.staging / name, self.path / name)
        for folder in sorted({str(folder) for name in staged for folder in PurePosixPath(name).parents}):
            io.sync_dir(self.path / folder)
        for name in (*[name for name in late if name not in LATE], *LATE):
            if name in late:
                self.put(name, late[name])
        self._clear_staging()

    def abandon(self) -> None:
        """Remove what an unsuccessful run has staged and published; a result that is complete stays."""
        if not io.exists(self.path / MARKER):
            self._remove([*map(str, self._run().get("files", ()))])
        self._clear_staging()

    def _marker(self) -> dict[str, Any]:
        path = self.path / MARKER
        try:
            return strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
        except StreamMergeError as error:
            raise OutputExistsError(
                f"`{path}` is there and cannot be read: {error}", "choose another `--output`"
            ) from error

    def _run(self) -> dict[str, Any]:
        path = self.staging / RUN
        try:
            return strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
        except (InputMissingError, MalformedInputError):
            return {}

    def _remove(self, files: Sequence[str]) -> None:
        """Remove a result or what was published of one, what loaders go by first, and whatever is staged."""
        for name in (MARKER, CONFIG, INDEX):
            io.remove(self.path / name)
        io.sync_dir(self.path)
        folders: set[Path] = set()
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                continue  # a report that was tampered with never reaches outside its own directory
            io.remove(self.path / name)
            folders.update(parent for parent in (self.path / name).parents if self.path in parent.parents)
        io.remove(self.path / INPUTS)
        self._clear_staging(keep=RUN)
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            io.remove_dir_if_empty(folder)

    def _clear_staging(self, keep: str = "") -> None:
        """Empty the staging area, but for `keep`, and remove it; its record of the run goes last, so that the
        directory is ours until it is empty."""
        if not io.exists(self.staging):
            return
        for name in sorted(io.list_tree(self.staging), key=lambda name: name == RUN):
            if name != keep:
                io.remove(self.staging / name)
        io.remove_empty_dirs(self.staging)


def _difference(report: Mapping[str, Any], plan_digest: str) -> str:
    return "made from other inputs" if report.get("plan") == plan_digest else "made by another plan"
