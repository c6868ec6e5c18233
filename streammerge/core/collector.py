"""Python's cycle collector, out of the way while very many values are made.

A plan is a tree of values without a cycle; the collector would look through all of them again and again as they are
made. The invariant: it is as it was when the block ends.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No collection of cycles inside the block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
