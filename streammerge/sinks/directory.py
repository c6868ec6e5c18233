"""The output directory: what is there, whether a run may use it, and how a result is published in it.

The commit protocol: everything is written below `.streammerge/`, in a folder that belongs to one plan and one set of
inputs, synced, then renamed into place in the order shards, sidecars, index, config.json, report. The report is the
completion marker: a directory without it is unfinished, and one without config.json or index is nothing that a loader
takes. Whatever a run does, another run of the same plan may do at the same time or again: all of them write the same
bytes, and nobody touches the folder of another plan but to remove it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.digests import sealed
from streammerge.core.errors import InputReadError, OutputExistsError, StreamMergeError
from streammerge.core.locks import Lock, lock
from streammerge.core.text import some_of
from streammerge.sinks.records import RUN, changed_files, files_of, read_run, told_apart

STAGING = ".streammerge"
MARKER = "streammerge.json"
INPUTS = ".streammerge-inputs.json"
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


@dataclass(frozen=True, slots=True)
class _Found:
    """What a run meets: its finished result, or `files` of earlier ones, which it `replaces` or goes on with. `begun`
    says that one of them was its own."""

    files: Sequence[str] = ()
    replaces: bool = False
    complete: bool = False
    begun: bool = False


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
        if self.runs() or self._unreadable():
            return State.UNFINISHED
        names = io.list_tree(self.path) if io.is_dir(self.path) else [self.path.name]
        # A run that was killed before it wrote down its plan leaves a temporary file in the staging area, at most.
        return State.FOREIGN if any(not name.startswith(f"{STAGING}/") for name in names) else State.EMPTY

    def runs(self) -> dict[Path, dict[str, Any]]:
        """The folders of unfinished runs, and what each of them wrote down of itself."""
        return {folder: run for folder in self._folders() if (run := read_run(folder)) is not None}

    def _folders(self) -> list[Path]:
        """The folders of runs, whether their records can be read or not."""
        if not io.is_dir(self.staging):
            return []
        return [folder for name in io.list_dir(self.staging) if io.is_dir(folder := self.staging / name)]

    def _unreadable(self) -> set[Path]:
        """The folders whose record somebody has damaged: we write it in one step."""
        there = [folder for folder in self._folders() if io.exists(folder / RUN)]
        # Looked for again, as another run may have removed it between the first look and the reading.
        return {folder for folder in there if read_run(folder) is None and io.exists(folder / RUN)}

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
        self.run = self.staging / str(identity["fingerprint"])[:FOLDER_DIGITS]
        found = self._look(identity, files, overwrite=overwrite)
        if not found.complete:
            self._take_lock()
            found = self._look(identity, files, overwrite=overwrite)  # another run may have ended since
        if found.complete:
            self._clear_staging()
            return False
        io.make_dirs(self.run)
        # Written down before anything is removed: whenever this is cut short, the next run knows what is ours, and
        # whether it has to begin with the removal.
        record = {**identity, "files": sorted({*found.files, *files}), "replaces": found.replaces}
        self.put(RUN, strict_json.dumps(sealed(record)), into=self.run)
        if found.replaces:
            self._remove(found.files)
            self.put(RUN, strict_json.dumps(sealed({**record, "replaces": False})), into=self.run)
        return not self._look_back(identity, files, begun=found.begun).complete

    def _look_back(self, identity: Mapping[str, Any], files: Sequence[str], *, begun: bool) -> _Found:
        """Look again when the run is written down: where there are no locks, another one may have come in between. Of
        two different merges that begin at once, each sees the other, unless the other has already seen it and gone."""
        try:
            found = self._look(identity, files, overwrite=False)
        except OutputExistsError:
            if not begun:
                _empty(self.run)
            raise
        if found.complete:
            self._clear_staging()
        return found

    def _look(self, identity: Mapping[str, Any], wanted: Sequence[str], *, overwrite: bool) -> _Found:
        """What is there for a run to go on with or to replace. Raises OutputExistsError for what it may not."""
        fingerprint, damaged = str(identity["fingerprint"]), self._unreadable()
        runs = list(self.runs().values())
        finished = self.marker() if self.state() is State.FINISHED else None
        if finished and finished.get("fingerprint") == fingerprint and not overwrite:
            return _Found(complete=True)
        own = next((run for run in runs if run["fingerprint"] == fingerprint), {})
        others = [(finished, "the finished result", "choose another `--output`")] if finished else []
        advice = "finish it with the command that began it"
        others += [(run, "an unfinished run", advice) for run in runs if run["fingerprint"] != fingerprint]
        differing = [(told_apart(other, identity), *rest) for other, *rest in others]
        if "base_files" in own and own["base_files"] != identity.get("base_files"):
            differing.append((changed_files(own, identity), "an unfinished run", "put back what was there"))
        if damaged - {self.run}:
            differing.append(("merge, whose record cannot be read", "an unfinished run", "put the record back"))
        if differing and not overwrite:
            difference, what, advice = differing[0]
            raise OutputExistsError(
                f"`{self.path}` holds {what} of another merge",
                f"it was made from another {difference}; {advice}, or give `--overwrite` to replace it",
            )
        results = [*runs, *([finished] if finished else [])]
        # The folder has the name of this very merge: what it would have put there is its own, and is read before use.
        files = {name for result in results for name in files_of(result)} | {*(wanted if self.run in damaged else ())}
        self._refuse_foreign(files, damaged)
        begun = bool(own) or self.run in damaged
        return _Found(sorted(files), replaces=bool(differing or own.get("replaces")), begun=begun)

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
            # NFS and FUSE keep a file that is removed while it is open, under another name, until now.
            with contextlib.suppress(StreamMergeError):
                io.remove_dir_if_empty(self.staging)

    def _refuse_foreign(self, ours: Collection[str], damaged: Collection[Path]) -> None:
        """Raise OutputExistsError, before anything is touched, if there is a file that no run of ours put there; of a
        run whose record is damaged, nobody knows what it did."""
        hint = "choose an `--output` that is empty or does not exist"
        if damaged:
            hint = f"the record `{min(damaged) / RUN}`, which told whose they are, cannot be read; {hint}"
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
            self._refuse_others(own=True)
            if "/" in name:
                io.make_dirs((self.path / name).parent)
            io.rename(self.run / name, self.path / name)
        for folder in sorted({str(folder) for name in staged for folder in PurePosixPath(name).parents}):
            io.sync_dir(self.path / folder)
        for name in (*[name for name in late if name not in LATE], *LATE):
            if name in late:
                self._refuse_others(own=True)
                self.put(name, late[name])
        try:
            self._refuse_others(own=False)
        except OutputExistsError:
            io.remove(self.path / MARKER)  # over what the other one has begun to replace
            raise
        self._clear_staging()

    def _refuse_others(self, *, own: bool) -> None:
        """Raise OutputExistsError if another merge has begun here, or has removed what says that this one did (`own`).
        It cannot where locks work, and removes our folder before anything else where they do not."""
        runs = {folder for folder in self._folders() if io.exists(folder / RUN)}
        if runs - {self.run} or (own and self.run not in runs):
            hint = "let the other one finish, or run the same command again"
            raise OutputExistsError(f"another run has taken over `{self.path}`", hint)

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
            self._remove([name for run in self.runs().values() for name in files_of(run)])
        self._clear_staging()

    def marker(self) -> dict[str, Any]:
        """The report of the finished result. Raises OutputExistsError where it is none, InputReadError where the system
        does not give it back."""
        path = self.path / MARKER
        try:
            return strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
        except InputReadError:
            raise
        except StreamMergeError as error:
            raise OutputExistsError(
                f"`{path}` is there and cannot be read: {error}", "choose another `--output`"
            ) from error

    def _remove(self, files: Sequence[str]) -> None:
        """Remove a result or what was published of one, what loaders go by first, and whatever is staged but the record
        of this run."""
        for name in reversed(LATE):
            io.remove(self.path / name)
        io.sync_dir(self.path)
        for folder in self._folders():  # first: who still works in one can publish nothing more
            _empty(folder, but=RUN if folder == self.run else None)
        self._remove_files(files)
        io.remove(self.path / INPUTS)
        io.sync_dir(self.path)

    def _remove_files(self, files: Sequence[str]) -> None:
        folders: set[Path] = set()
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                continue  # a report that was tampered with never reaches outside its own directory
            io.remove(self.path / name)
            folders.update(parent for parent in (self.path / name).parents if self.path in parent.parents)
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            io.remove_dir_if_empty(folder)
            if io.exists(folder):
                io.sync_dir(folder)

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


def _empty(folder: Path, but: str | None = None) -> None:
    """Remove the folder of a run; its record of itself goes last, so that the directory is ours until it is empty."""
    for name in sorted(io.list_tree(folder), key=lambda name: name == RUN):
        if name != but:
            io.remove(folder / name)
    io.remove_empty_dirs(folder)
