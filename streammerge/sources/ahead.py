"""Reading a base into the page cache ahead of those who work on it, so that the disk never waits for the arithmetic.

A thread of its own goes through the weight files in their order, at most a window ahead of what was used. Nothing
depends on it: what it does not reach in time is read when it is needed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from streammerge.core import io, machine, pages
from streammerge.core.errors import StreamMergeError
from streammerge.core.resources import started
from streammerge.sources.files import TensorFiles

STEP = 16 * 2**20
"""Bytes that are asked for at a time."""
WINDOW = 4 * 2**30
"""Bytes that are read ahead at most: what a fast disk reads in the seconds that torch takes to load."""
LEAST = 4 * STEP
"""With less room than this, nothing is read ahead."""
LOOK = 0.005
"""Seconds between two looks at how far the others are."""


class ReadAhead:
    """Reads `names` below the root of `files` ahead, within `with`. Files that are read past the page cache, or lie on
    another machine, are left alone. While `gently` says so, the disk is left to others half of the time."""

    def __init__(
        self,
        files: TensorFiles,
        names: Sequence[str],
        window: int | None = None,
        gently: Callable[[], bool] = lambda: False,
    ) -> None:
        self._files, self._names, self._gently = files, names, gently
        self._window = min(WINDOW, machine.room_for_pages()) if window is None else window
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ReadAhead:
        if self._files.mapped and self._window >= LEAST:
            self._thread = started("ahead", self._run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        before = 0
        for name in self._names:
            if self._stop.is_set():
                return
            try:
                before += self._read(name, before)
            except StreamMergeError:
                return  # whoever needs these bytes meets the same error, and says what it means

    def _read(self, name: str, before: int) -> int:
        """Read one file, `before` which lie so many bytes of others; its size."""
        path = str(self._files.root / name)
        fd = io.open_input(path)
        try:
            size = io.state_of(fd, path).size
            at = 0
            while at < size and self._wait(before + at):
                # What the others have passed is in the page cache already.
                at = max(at, min(self._files.used - before, size))
                began = time.monotonic()
                at += pages.cache(fd, path, at, min(STEP, size - at)) or size
                if self._gently():
                    self._stop.wait(time.monotonic() - began)
            return size
        finally:
            io.close(fd)

    def _wait(self, position: int) -> bool:
        """Wait until `position` is within the window; False when there is nobody left to read for."""
        while position - self._files.used > self._window and not self._stop.is_set():
            self._stop.wait(LOOK)
        return not self._stop.is_set()
