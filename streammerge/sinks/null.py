"""Nowhere: everything is made, measured and digested, and nothing is written."""

from __future__ import annotations

from streammerge.sinks.buffers import Buffers, Origin
from streammerge.sinks.journal import Made


class NullSink(Buffers):
    """Takes pieces and forgets them. With a buffer for each worker, nobody ever waits."""

    def start(self) -> None:
        """Nothing is there."""

    def commit(
        self, number: int, offset: int, buffer: memoryview, size: int, origin: Origin | None, made: Made | None
    ) -> None:
        """The buffer is free again."""
        self.release(buffer)

    def finish(self) -> None:
        """Nothing is under way."""

    def keep(self) -> None:
        """There is nothing."""

    def close(self) -> None:
        """Nothing is open."""
