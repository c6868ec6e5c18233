"""The folder of one run below `OUT/.streammerge/`: what it makes, its record of itself, and its licence to change OUT.

Whatever appears in the output is renamed out of this folder, and whatever is taken away is first renamed into it. Who
takes over moves the folder, in one step, to a place of its own: from then on nothing that its owner does finds a path,
and of two that take over from each other one succeeds. So at most one run changes an output at a time, whether the file
system has locks or not, and however long somebody was stopped between a look and a deed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.digests import sealed
from streammerge.core.errors import InputMissingError, StreamMergeError, WriteError
from streammerge.sinks.records import RUN

FINGERPRINT_DIGITS = 16
"""Digits of a fingerprint that the name of a folder begins with."""
RANDOM_BYTES = 4
"""That the name ends with, so that no two runs ever have the same one: process ids repeat between containers."""
TAKEN = "taken.tmp"
"""What was in the output a moment ago, and is about to be removed."""


class RunFolder:
    """A folder of our own: not there before `begin`, and gone when another run has taken over."""

    def __init__(self, output: Path, staging: Path, fingerprint: str) -> None:
        self._output, self._prefix = output, fingerprint[:FINGERPRINT_DIGITS]
        self.path = staging / f"{self._prefix}.{os.urandom(RANDOM_BYTES).hex()}"

    def is_of_same_merge(self, folder: Path) -> bool:
        """Whether the name of another folder says that it belongs to a run of the same plan and inputs."""
        return folder.name.partition(".")[0] == self._prefix

    def begin(self, earlier: Path | None = None) -> None:
        """Make the folder, or take over that of an earlier run of the same merge, with all that is in it."""
        if earlier is None:
            io.make_dirs(self.path)
        else:
            io.rename(earlier, self.path)

    def write_down(self, record: Mapping[str, Any]) -> None:
        """Say durably what this run is, in one step."""
        self.put(RUN, strict_json.dumps(sealed(record)), self.path)

    def put(self, name: str, data: bytes, home: Path) -> None:
        """Write a small file durably here, then rename it to `name` in `home`."""
        temporary = self.path / f"{name.rpartition('/')[2]}.tmp"
        io.remove(temporary)
        io.write_new(temporary, data)
        io.make_dirs_of(home, name)
        io.rename(temporary, home / name)
        io.sync_dir((home / name).parent)

    def publish(self, staged: Sequence[str]) -> None:
        """Move finished files into the output, durably."""
        for name in staged:
            io.make_dirs_of(self._output, name)
            io.rename(self.path / name, self._output / name)
        for folder in sorted({str(folder) for name in staged for folder in PurePosixPath(name).parents}):
            io.sync_dir(self._output / folder)

    def take_away(self, name: str) -> None:
        """Remove a file from the output, if it is there."""
        try:
            taken = self._take(self._output / name, TAKEN)
        except WriteError:
            if not io.exists(self.path):
                raise
            # A disk that is full, or fails, may still remove: better that than what a loader takes.
            io.remove(self._output / name)
            return
        if taken:
            io.remove(self.path / TAKEN)

    def revoke(self, folder: Path) -> None:
        """Remove the folder of another run, which can change nothing more from the first moment on."""
        if self._take(folder, folder.name):
            empty(self.path / folder.name)

    def _take(self, path: Path, name: str) -> bool:
        """Move something here as `name`; whether it was there. Raises WriteError if this folder is not."""
        try:
            io.rename(path, self.path / name)
        except WriteError as error:
            if not vanished(error) or not io.exists(self.path):
                raise
            return False
        return True


def empty(folder: Path, *, but: str | None = None) -> None:
    """Remove the folder of a run, which may be gone already, or what is in it `but` one file. Its record of itself goes
    last: until then, everybody can tell whose output this is."""
    with vanishing():
        for name in sorted(io.list_tree(folder), key=lambda name: name == RUN):
            if name != but:
                io.remove(folder / name)
        io.remove_empty_dirs(folder)


@contextlib.contextmanager
def vanishing() -> Iterator[None]:
    """What another run may remove at the same time: all that is wanted is that it is gone."""
    try:
        yield
    except StreamMergeError as error:
        if not vanished(error):
            raise


def vanished(error: StreamMergeError) -> bool:
    """Whether an operation failed because what it was about is not there."""
    return isinstance(error, InputMissingError) or isinstance(error.__cause__, FileNotFoundError)
