"""Looks on while a merge writes, and notes every step that comes too early.

What a power cut would leave cannot be seen while the power is on: a file that was renamed before it was synced reads
like any other. So the order itself is checked, on every call of `core/io.py` that changes something: a file is renamed
when its bytes are durable, the index comes when the directory entries of all it names are, config.json after it, the
report last; an overwrite first takes away, durably, what loaders go by; and nothing is written but below the output.
Always on in the suite (`tests/conftest.py`) and in the runs of the campaigns.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.core import io
from streammerge.sinks.directory import INDEX, LATE, MARKER, STAGING, OutputDirectory
from streammerge.sinks.records import RUN

UNFINISHED = (".tmp", ".part")
"""Ends of the names of files in the making."""


@dataclass(slots=True)
class _Bytes:
    """How often a file was written to, and how many of those writes are durable."""

    written: int = 0
    synced: int = 0


@dataclass(slots=True)
class _Scope:
    """One output while a run works on it."""

    root: str
    began: bool
    """Whether an earlier run had begun here."""
    published: list[str] = field(default_factory=list)
    unsynced: dict[str, set[str]] = field(default_factory=dict)
    """By folder: the entries that are not durable yet, made or removed."""


class Order:
    """What was done so far in this process, and in `wrong` what should not have been done yet."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.installed = False
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.wrong: list[str] = []
        self._files: dict[str, _Bytes] = {}
        self._fds: dict[int, str] = {}
        self._scopes: dict[int, _Scope] = {}

    def install(self) -> None:
        """Look on from now on; once for a process."""
        if self.installed:
            return
        self.installed = True
        for name in ("create", "open_again", "open_journal", "open_lock"):
            self._wrap(io, name, after=self._opened)
        for name, position in (("write_at", 0), ("append", 0), ("clone", 2)):
            self._wrap(io, name, before=functools.partial(self._written, position))
        self._wrap(io, "sync_file", around=self._synced)
        self._wrap(io, "rename", before=self._renames, after=self._renamed)
        self._wrap(io, "remove", before=self._removes)
        self._wrap(io, "sync_dir", after=self._synced_dir)
        for name in ("make_dirs", "make_dirs_of"):
            self._wrap(io, name, before=lambda path, *_: self._is_inside(os.fspath(path)))
        self._wrap(OutputDirectory, "claim", before=self._claims)
        self._wrap(OutputDirectory, "release", before=self._releases)

    def _wrap(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
        around: Callable[..., Any] | None = None,
    ) -> None:
        """Call `before` with the arguments, `after` with the result and the arguments."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def watched(*arguments: Any, **options: Any) -> Any:
            if around:
                return around(real, *arguments)
            if before:
                with self._lock:
                    before(*arguments)
            result = real(*arguments, **options)
            if after:
                with self._lock:
                    after(result, *arguments)
            return result

        setattr(owner, name, watched)

    # --- single files ---
    def _opened(self, fd: int, path: str | os.PathLike[str], *_: object) -> None:
        shown = os.fspath(path)
        self._fds[fd] = shown
        self._files.setdefault(shown, _Bytes())
        self._is_inside(shown)
        if stat.S_ISLNK(os.lstat(shown).st_mode):
            self.wrong.append(f"`{shown}` is a link, and was opened for writing")

    def _written(self, position: int, *arguments: Any) -> None:
        path = self._fds.get(arguments[position])
        if path is not None:
            self._files.setdefault(path, _Bytes()).written += 1

    def _synced(self, real: Callable[..., None], fd: int, path: str) -> None:
        state = self._files.get(path, _Bytes())
        seen = state.written
        real(fd, path)
        state.synced = max(state.synced, seen)

    # --- directories ---
    def _scope_of(self, path: str) -> _Scope | None:
        inside = (scope for scope in self._scopes.values() if f"{path}/".startswith(f"{scope.root}/"))
        return next(inside, None)

    def _is_inside(self, path: str) -> None:
        if self._scopes and self._scope_of(path) is None:
            self.wrong.append(f"`{path}` is written to, and lies in none of the outputs")

    def _claims(self, directory: OutputDirectory, *_: object) -> None:
        began = bool(list((directory.path / STAGING).glob(f"*/{RUN}")))
        self._scopes[id(directory)] = _Scope(os.fspath(directory.path), began)

    def _releases(self, directory: OutputDirectory) -> None:
        scope = self._scopes.pop(id(directory), None)
        failed = sys.exception() is not None
        if scope and MARKER in scope.published and scope.unsynced.get(scope.root) and not failed:
            self.wrong.append(f"the run ends before {sorted(scope.unsynced[scope.root])} is durable in its directory")

    def _renames(self, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        old, new = os.fspath(source), os.fspath(target)
        self._is_inside(new)
        state = self._files.get(old)
        if state is None and old.endswith(UNFINISHED) and not new.endswith(UNFINISHED):
            self.wrong.append(f"`{old}` is renamed to `{new}`, and nobody synced it")
        if state is not None and state.synced < state.written and not new.endswith(UNFINISHED):
            self.wrong.append(f"`{old}` is renamed to `{new}` before it is synced")
        scope = self._scope_of(new)
        if scope is None:
            return
        taken, published = (not self._is_staged(scope, path) for path in (old, new))
        if taken and os.path.lexists(old):
            self._takes_away(scope, os.path.relpath(old, scope.root))
        if published:
            self._publishes(scope, os.path.relpath(new, scope.root), old)

    def _is_staged(self, scope: _Scope, path: str) -> bool:
        return f"{path}/".startswith(f"{scope.root}/{STAGING}/")

    def _publishes(self, scope: _Scope, name: str, source: str) -> None:
        """Whether it is the turn of a file to appear in the output."""
        if name not in LATE:
            late = [other for other in LATE if other in scope.published]
            late += [other for other in LATE if not scope.began and os.path.lexists(f"{scope.root}/{other}")]
            late += [MARKER] if os.path.lexists(f"{scope.root}/{MARKER}") else []
            if late:
                self.wrong.append(f"`{name}` appears when {late} is there")
            return
        folders = [folder for folder in scope.unsynced if os.path.isdir(folder)]  # one that is gone took all along
        waiting = sorted(path for folder in folders for path in scope.unsynced[folder])
        if waiting:
            self.wrong.append(f"`{name}` appears before the directory entries of {waiting} are durable")
        early = [other for other in LATE[LATE.index(name) + 1 :] if other in scope.published]
        if early:
            self.wrong.append(f"`{name}` appears after {early}")
        missing = [file for file in _named_in(source, name) if not os.path.lexists(f"{scope.root}/{file}")]
        if missing:
            self.wrong.append(f"`{name}` appears before {missing}")

    def _renamed(self, _: None, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        old, new = os.fspath(source), os.fspath(target)
        for path in [path for path in self._files if f"{path}/".startswith(f"{old}/")]:  # a folder takes all along
            self._files[new + path[len(old) :]] = self._files.pop(path)
        scope = self._scope_of(new)
        name = os.path.relpath(new, scope.root) if scope else ""
        if scope and not name.startswith(STAGING):
            scope.published.append(name)
            scope.unsynced.setdefault(os.path.dirname(new), set()).add(name)

    def _removes(self, path: str | os.PathLike[str]) -> None:
        shown = os.fspath(path)
        self._is_inside(shown)
        self._files.pop(shown, None)
        scope = self._scope_of(shown)
        if scope and not self._is_staged(scope, shown) and os.path.lexists(shown):
            self._takes_away(scope, os.path.relpath(shown, scope.root))

    def _takes_away(self, scope: _Scope, name: str) -> None:
        """Whether it is the turn of a file to go from the output."""
        first = LATE[LATE.index(name) + 1 :] if name in LATE else LATE
        there = [other for other in first if os.path.lexists(f"{scope.root}/{other}")]
        undone = set(first) & scope.unsynced.get(scope.root, set()) if name not in LATE else set()
        if there or undone:
            self.wrong.append(f"`{name}` is removed before {sorted({*there, *undone})} is, durably")
        scope.unsynced.setdefault(os.path.dirname(f"{scope.root}/{name}"), set()).add(name)

    def _synced_dir(self, _: None, path: str | os.PathLike[str]) -> None:
        for scope in self._scopes.values():
            scope.unsynced.pop(os.path.normpath(path), None)


def _named_in(path: str, name: str) -> Sequence[str]:
    """The files that an index or a report says are there."""
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError:  # a disk that is made to fail gives nothing back to us either
        return []
    if name == INDEX:
        return sorted(set(document["weight_map"].values()))
    return sorted([*document["files"], *document["sidecars"]]) if name == MARKER else []


ORDER = Order()
"""The one of this process."""
