"""The output directory: what is there, whether a run may use it, and how a result is published in it.

The commit protocol: everything is written below `.streammerge/`, in a folder that belongs to one run, synced, then
renamed into place in the order shards, sidecars, index, config.json, report. The report is the completion marker: a
directory without it is unfinished, and one without config.json or index is nothing that a loader takes. A run of the
same merge takes the folder over and goes on; one that replaces the result of another merge takes its folder away before
anything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.errors import InputMissingError, InputReadError, OutputExistsError, StreamMergeError
from streammerge.core.locks import Lock, lock
from streammerge.core.text import some_of
from streammerge.sinks.records import INPUTS, RUN, changed_files, files_of, malformed_part, read_run, told_apart
from streammerge.sinks.run_folder import RunFolder, empty, vanishing

STAGING = ".streammerge"
MARKER = "streammerge.json"
LOCK = "lock"
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LATE = (INDEX, CONFIG, MARKER)
"""The files that make a directory loadable, in the order in which they appear; removed in reverse."""


class State(Enum):
    """What a directory holds."""

    EMPTY = "nothing"
    FINISHED = "a finished result"
    UNFINISHED = "an unfinished run"
    FOREIGN = "files that are not ours"


@dataclass(frozen=True, slots=True)
class _Found:
    """What a run meets: its finished result, or `files` of earlier ones, which it `replaces` or goes on with; `earlier`
    are the folders of unfinished runs of the same merge."""

    files: Sequence[str] = ()
    replaces: bool = False
    complete: bool = False
    earlier: Sequence[Path] = ()


class OutputDirectory:
    """One output directory, before and while something is written into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.staging = path / STAGING
        self.own = RunFolder(path, self.staging, "")
        self._lock: Lock | None = None

    @property
    def run(self) -> Path:
        """The folder of this run, once the directory is claimed."""
        return self.own.path

    def state(self) -> State:
        """What is there now."""
        if not io.exists(self.path):
            return State.EMPTY
        if io.exists(self.path / MARKER):
            return State.FINISHED
        if any(io.exists(folder / RUN) for folder in self._folders()):
            return State.UNFINISHED
        names = io.list_tree(self.path) if io.is_dir(self.path) else [self.path.name]
        # A run that was killed before it wrote down its plan leaves a temporary file in the staging area, at most.
        return State.FOREIGN if any(not name.startswith(f"{STAGING}/") for name in names) else State.EMPTY

    def runs(self) -> dict[Path, dict[str, Any]]:
        """The folders of unfinished runs, and what each of them wrote down of itself."""
        return {folder: run for folder in self._folders() if (run := read_run(folder)) is not None}

    def _folders(self) -> list[Path]:
        """The folders of runs, whether their records can be read or not."""
        with contextlib.suppress(InputMissingError):  # the last run may be tidying up
            if io.is_dir(self.staging):
                return [folder for name in io.list_dir(self.staging) if io.is_dir(folder := self.staging / name)]
        return []

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
        self.own = RunFolder(self.path, self.staging, str(identity["fingerprint"]))
        found = self._look(identity, files, overwrite=overwrite)
        if not found.complete:
            self._take_lock()
            found = self._look(identity, files, overwrite=overwrite)  # another run may have ended since
        if not found.complete:
            self.own.begin(next(iter(found.earlier), None))
            # Written down before anything is removed: whenever this is cut short, the next run knows what is ours, and
            # whether it has to begin with the removal.
            record = {**identity, "files": sorted({*found.files, *files}), "replaces": found.replaces}
            self.own.write_down(record)
            found = self._look_back(identity, files, overwrite=overwrite, begun=bool(found.earlier))
        if found.complete:
            self._tidy_up(found.earlier)
            return False
        for folder in found.earlier:
            self.own.revoke(folder)
        if found.replaces:
            self._replace({**record, "files": sorted({*found.files, *files}), "replaces": True})
        return True

    def _look_back(self, identity: Mapping[str, Any], files: Sequence[str], *, overwrite: bool, begun: bool) -> _Found:
        """Look again when the run is written down: where there are no locks, another one may have come in between. Who
        comes later sees us. Of two different merges that begin at once, each sees the other, unless the other has
        already seen it and gone."""
        try:
            return self._look(identity, files, overwrite=overwrite)
        except OutputExistsError:
            if not begun:
                empty(self.run)
            raise

    def _replace(self, record: Mapping[str, Any]) -> None:
        """Remove what is there, all of which the record names, once nobody else can add to it."""
        self.own.write_down(record)
        for folder in self._folders():
            if folder != self.run:
                self.own.revoke(folder)
        self._remove(record["files"])
        self.own.write_down({**record, "replaces": False})

    def _look(self, identity: Mapping[str, Any], wanted: Sequence[str], *, overwrite: bool) -> _Found:
        """What is there for a run to go on with or to replace. Raises OutputExistsError for what it may not."""
        fingerprint, damaged, runs = str(identity["fingerprint"]), self._unreadable(), self.runs()
        own = {folder: run for folder, run in runs.items() if run["fingerprint"] == fingerprint}
        own_damaged = {folder for folder in damaged if self.own.is_of_same_merge(folder)}
        earlier = sorted({*own, *own_damaged} - {self.run})
        finished = self.marker() if self.state() is State.FINISHED else None
        if finished and finished.get("fingerprint") == fingerprint and not overwrite:
            return _Found(complete=True, earlier=earlier)
        others = [(finished, "the finished result", "choose another `--output`")] if finished else []
        advice = "finish it with the command that began it"
        others += [(run, "an unfinished run", advice) for folder, run in runs.items() if folder not in own]
        differing = [(told_apart(other, identity), *rest) for other, *rest in others]
        differing += [
            (changed_files(run, identity), "an unfinished run", "put back what was there")
            for run in own.values()
            if "base_files" in run and run["base_files"] != identity.get("base_files")
        ]
        if damaged - own_damaged:
            differing.append(("merge, whose record cannot be read", "an unfinished run", "put the record back"))
        if differing and not overwrite:
            difference, what, advice = differing[0]
            raise OutputExistsError(
                f"`{self.path}` holds {what} of another merge",
                f"it was made from another {difference}; {advice}, or give `--overwrite` to replace it",
            )
        results = [*runs.values(), *([finished] if finished else [])]
        # The folder has the name of this very merge: what it would have put there is its own, and is read before use.
        files = {name for result in results for name in files_of(result)} | {*(wanted if own_damaged else ())}
        self._refuse_foreign(files, damaged)
        replaces = bool(differing) or any(run.get("replaces") for run in own.values())
        return _Found(sorted(files), replaces=replaces, earlier=earlier)

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
        if self.path.is_symlink() and not io.exists(self.path):
            raise OutputExistsError(f"the output `{self.path}` is a link to what is not there", hint)
        if io.exists(self.path) and not io.is_dir(self.path):
            raise OutputExistsError(f"the output `{self.path}` is not a directory", hint)
        known = {*ours, *LATE, INPUTS} if ours else set()
        there = io.list_tree(self.path) if io.exists(self.path) else []
        foreign = [name for name in there if name not in known and not name.startswith(f"{STAGING}/")]
        if foreign:
            raise OutputExistsError(f"`{self.path}` is not empty: it holds {some_of(foreign, 3)}", hint)

    def publish(self, staged: Sequence[str], late: Mapping[str, bytes]) -> None:
        """Move finished files from staging into place, then write the late files in their order, then tidy up."""
        self.own.publish(staged)
        for name in (*[name for name in late if name not in LATE], *LATE):
            if name in late:
                self.own.put(name, late[name], self.path)
        self._tidy_up()

    @property
    def alone(self) -> bool:
        """Whether it is certain that no other process is at work here."""
        return self._lock is not None and self._lock.alone

    def withdraw(self) -> None:
        """Take back the files that make the directory loadable, unless the result is complete."""
        if not io.exists(self.path / MARKER):
            for name in reversed(LATE):
                self.own.take_away(name)

    def abandon(self) -> None:
        """Remove what an unsuccessful run has staged and published; a result that is complete stays."""
        if not io.exists(self.path / MARKER):
            self._remove(files_of(read_run(self.run) or {}))
        self._tidy_up()

    def marker(self) -> dict[str, Any]:
        """The report of the finished result. Raises OutputExistsError where it is none, InputMissingError where it is
        gone, InputReadError where the system does not give it back."""
        path, hint = self.path / MARKER, "choose another `--output`"
        try:
            report = strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
        except (InputMissingError, InputReadError):
            raise
        except StreamMergeError as error:
            raise OutputExistsError(f"`{path}` is there and cannot be read: {error}", hint) from error
        if part := malformed_part(report):
            raise OutputExistsError(f"`{path}` is there and is no report of ours: it has no usable `{part}`", hint)
        return report

    def _remove(self, files: Sequence[str]) -> None:
        """Remove a result or what was published of one, what loaders go by first, and whatever is staged but the record
        of this run."""
        for name in reversed(LATE):
            self.own.take_away(name)
        io.sync_dir(self.path)
        empty(self.run, but=RUN)
        folders: set[Path] = set()
        for name in (*files, INPUTS):
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                continue  # a report that was tampered with never reaches outside its own directory
            self.own.take_away(name)
            folders.update(parent for parent in (self.path / name).parents if self.path in parent.parents)
        for folder in sorted(folders, key=lambda path: -len(path.parts)):
            io.remove_dir_if_empty(folder)
            if io.exists(folder):
                io.sync_dir(folder)
        io.sync_dir(self.path)

    def _tidy_up(self, earlier: Sequence[Path] = ()) -> None:
        """The result is there, or nothing is: remove our folder, those of `earlier` runs of the same merge, and what
        is left of runs that never came to a record of themselves."""
        empty(self.run)
        for folder in earlier:
            with vanishing():
                self.own.begin(folder)
                if (read_run(self.run) or {}).get("replaces"):  # somebody was told to make it anew
                    io.rename(self.run, folder)
                else:
                    empty(self.run)
        with vanishing():
            for name in io.list_dir(self.staging):
                path = self.staging / name
                if not io.is_dir(path):
                    io.remove(path)
                elif not io.exists(path / RUN):
                    empty(path, but=RUN)  # which may come at any time: then the folder stays
            io.remove_dir_if_empty(self.staging)
