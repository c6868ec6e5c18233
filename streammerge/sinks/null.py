"""Nowhere: everything is made, measured and digested, and nothing is written."""

from __future__ import annotations

import queue

from streammerge.core import io
from streammerge.planning.memory import PIECE
from streammerge.sinks.buffers import Origin


class NullSink:
    """Takes pieces and forgets them."""

    def __init__(self, buffers: int) -> None:
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(buffers):
            self._free.put(io.aligned_buffer(PIECE))

    def lease(self) -> memoryview:
        """A buffer; there is always one for each worker."""
        return self._free.get()

    def commit(self, number: int, offset: int, buffer: memoryview, size: int, origin: Origin | None) -> None:
        """The buffer is free again."""
        self._free.put(buffer)

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is open."""
