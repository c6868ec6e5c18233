"""The output directory: what is there, whether a run may use it, and how a result is published in it.

The commit protocol: everything is written below `.streammerge/`, in a folder that belongs to one plan and one set of
inputs, synced, then renamed into place in the order shards, sidecars, index, config.json, report. The report is the
completion marker: a directory without it is unfinished, and one without config.json or index is nothing that a loader
takes. Whatever a run does, another run of the same plan may do at the same time or again: all of them write the same
bytes, and nobody touches the folder of another plan but to remove it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.errors import InputMissingError, MalformedInputError, OutputExistsError, StreamMergeError
from streammerge.core.locks import Lock, lock
from streammerge.core.text import some_of

STAGING = ".streammerge"
MARKER = "streammerge.json"
INPUTS = ".streammerge-inputs.json"
RUN = "run.json"
"""In the folder of a run: which plan and inputs it belongs to, and the files it would write."""
LOCK = "lock"
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LATE = (INDEX, CONFIG, MARKER)
"""The files that make a directory loadable, in the order in which they appear; removed in reverse."""
FOLDER_DIGITS = 16
"""Digits of a fingerprint that name the folder of a run."""


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
        self.run = self.staging
        """The folder of this run, once it is claimed."""
        self._lock: Lock | None = None

    def state(self) -> State:
        """What is there now."""
        if not io.exists(self.path):
            return State.EMPTY
        if io.exists(self.path / MARKER):
            return State.FINISHED
        if self.runs():
            return State.UNFINISHED
        names = io.list_tree(self.path) if io.is_dir(self.path) else [self.path.name]
        # A run that was killed before it wrote down its plan leaves a temporary file in the staging area, at most.
        return State.FOREIGN if any(not name.startswith(f"{STAGING}/") for name in names) else State.EMPTY

    def runs(self) -> dict[Path, dict[str, Any]]:
        """The folders of unfinished runs, and what each of them wrote down of itself."""
        if not io.is_dir(self.staging):
            return {}
        folders = [self.staging / name for name in io.list_dir(self.staging)]
        return {folder: run for folder in folders if io.is_dir(folder) and (run := _read_run(folder)) is not None}

    def reclaimable(self) -> int:
        """Bytes of the result or the unfinished run that a run in its place removes or goes on with."""
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

    def claim(self, identity: Mapping[str, Any], files: Sequence[str], *, overwrite: bool) -> bool:
        """Make the directory ready for a run, with what an earlier one of the same identity has left; False if its
        finished result is already there.

        `identity` is the fingerprint of plan and inputs, the digest of the plan, and what the plan was made from, by
        the names that a report gives it; `files` is everything the run will write. Raises OutputExistsError for
        anything that is not ours to touch.
        """
        fingerprint = str(identity["fingerprint"])
        own = self.staging / fingerprint[:FOLDER_DIGITS]
        runs = self.runs()
        finished = self.marker() if self.state() is State.FINISHED else None
        if finished and finished.get("fingerprint") == fingerprint and not overwrite:
            self._clear_staging()
            return False
        foreign = [(finished, "the finished result", "choose another `--output`")] if finished else []
        advice = "finish it with the command that began it"
        foreign += [(run, "an unfinished run", advice) for run in runs.values() if run["fingerprint"] != fingerprint]
        if foreign and not overwrite:
            other, what, advice = foreign[0]
            raise OutputExistsError(
                f"`{self.path}` holds {what} of another merge",
                f"it was made from another {told_apart(other, identity)}; {advice}, "
                "or give `--overwrite` to replace it",
            )
        before = {name for other in [*runs.values(), *([finished] if finished else [])] for name in _files_of(other)}
        self._refuse_foreign(sorted(before))
        self._take_lock()
        self.run = own
        io.make_dirs(own)
        # Written down before anything is removed: whenever this is cut short, the next run knows what is ours.
        self.put(RUN, strict_json.dumps({**identity, "files": sorted({*before, *files})}), into=own)
        if foreign:
            self._remove(sorted(before), keep=own)
        elif before:
            self._remove_files(sorted(before.difference(files)))
        return True

    def _take_lock(self) -> None:
        """Keep other processes out, which would do the work twice. Nothing but their time depends on it."""
        io.make_dirs(self.staging)
        self._lock = lock(self.staging / LOCK)
        if self._lock is None:
            raise OutputExistsError(
                f"another run is at work on `{self.path}`", "wait for it, or choose another `--output`"
            )

    def release(self) -> None:
        """Let other processes in."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

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
        temporary = self.run / f"{name.rpartition('/')[2]}.{os.getpid()}.tmp"
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
            io.rename(self.run / name, self.path / name)
        for folder in sorted({str(folder) for name in staged for folder in PurePosixPath(name).parents}):
            io.sync_dir(self.path / folder)
        for name in (*[name for name in late if name not in LATE], *LATE):
            if name in late:
                self.put(name, late[name])
        self._clear_staging()

    @property
    def alone(self) -> bool:
        """Whether it is certain that no other process is at work here."""
        return self._lock is not None and self._lock.alone

    def withdraw(self) -> None:
        """Take back the files that make the directory loadable, unless the result is complete."""
        if not io.exists(self.path / MARKER):
            for name in reversed(LATE):
                io.remove(self.path / name)

    def abandon(self) -> None:
        """Remove what an unsuccessful run has staged and published; a result that is complete stays."""
        if not io.exists(self.path / MARKER):
            self._remove([name for run in self.runs().values() for name in _files_of(run)])
        self._clear_staging()

    def marker(self) -> dict[str, Any]:
        """The report of the finished result. Raises OutputExistsError where it cannot be read."""
        path = self.path / MARKER
        try:
            return strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
        except StreamMergeError as error:
            raise OutputExistsError(
                f"`{path}` is there and cannot be read: {error}", "choose another `--output`"
            ) from error

    def _remove(self, files: Sequence[str], keep: Path | None = None) -> None:
        """Remove a result or what was published of one, what loaders go by first, and whatever is staged but in the
        folder `keep`."""
        for name in (MARKER, CONFIG, INDEX):
            io.remove(self.path / name)
        io.sync_dir(self.path)
        self._remove_files(files)
        io.remove(self.path / INPUTS)
        for folder in self.runs():
            if folder != keep:
                _empty(folder)

    def _remove_files(self, files: Sequence[str]) -> None:
        folders: set[Path] = set()
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                continue  # a report that was tampered with never reaches outside its own directory
            io.remove(self.path / name)
            folders.update(parent for parent in (self.path / name).parents if self.path in parent.parents)
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            io.remove_dir_if_empty(folder)

    def _clear_staging(self) -> None:
        """Empty the staging area and remove it."""
        if not io.exists(self.staging):
            return
        for name in io.list_dir(self.staging):
            if io.is_dir(self.staging / name):
                _empty(self.staging / name)
            else:
                io.remove(self.staging / name)
        io.remove_empty_dirs(self.staging)


def _empty(folder: Path) -> None:
    """Remove the folder of a run; its record of itself goes last, so that the directory is ours until it is empty."""
    for name in sorted(io.list_tree(folder), key=lambda name: name == RUN):
        io.remove(folder / name)
    io.remove_empty_dirs(folder)


def _read_run(folder: Path) -> dict[str, Any] | None:
    """What a run wrote down of itself; None where it never came to that."""
    path = folder / RUN
    try:
        run = strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
    except (InputMissingError, MalformedInputError):
        return None
    return run if isinstance(run.get("fingerprint"), str) else None


def _files_of(result: Mapping[str, Any]) -> list[str]:
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
