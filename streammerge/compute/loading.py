"""torch as a guest: loaded in the background while a plan is made, used with one thread by each worker, and left with
as many threads as it had.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from streammerge.core import pages
from streammerge.core.resources import started

_loading: threading.Thread | None = None
_from_disk = False
_lock = threading.Lock()


def load_in_background() -> None:
    """Begin to import torch in a thread of its own, unless somebody has done so: it takes longer than a plan."""
    global _loading, _from_disk
    with _lock:
        if _loading is None and "torch" not in sys.modules:
            found = importlib.util.find_spec("torch")
            _from_disk = found is not None and found.cached is not None and not pages.is_cached(found.cached)
            _loading = started("torch", _load)


def _load() -> None:
    with contextlib.suppress(Exception):  # whoever needs torch meets the same error, and can raise it
        importlib.import_module("torch")


def wants_the_disk() -> bool:
    """Whether torch is being loaded from a disk and not from memory: thousands of small reads, each of which would wait
    behind a large one."""
    return _from_disk and not is_loaded()


def is_loaded() -> bool:
    """Whether torch can be used without waiting for it."""
    return "torch" in sys.modules and (_loading is None or not _loading.is_alive())


class TorchThreads:
    """torch's number of threads: one for each worker while a run lasts, and afterwards what it was."""

    def __init__(self) -> None:
        self._before: int | None = None
        self._lock = threading.Lock()

    def use_one(self) -> None:
        """Called by a worker before its first operation; waits until torch is there."""
        import torch

        with self._lock:
            self._remember()
        torch.set_num_threads(1)

    def _remember(self) -> None:
        import torch

        if self._before is None:
            self._before = torch.get_num_threads()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within `with`: what workers change is put right at the end. Does not wait for torch if nobody needed it."""
        if is_loaded():
            self._remember()
        try:
            yield
        finally:
            if self._before is not None:
                import torch

                torch.set_num_threads(self._before)
