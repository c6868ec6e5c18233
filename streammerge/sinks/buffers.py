"""Memory that output is made in and written from, and the threads that write it while more is made.

A fixed number of aligned buffers goes round: leased by who fills one, committed to be written, free again when it is.
Who wants one when all are under way waits for the disk; nothing else bounds how far the arithmetic runs ahead of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

from streammerge.core.resources import ThreadPool, aligned_buffer
from streammerge.planning.memory import PIECE, WRITERS
from streammerge.sinks.journal import Made
from streammerge.sources.files import OpenFile

Origin = tuple[OpenFile, int]
"""A stored file and the offset in it at which the very bytes lie that are to be written."""


class Sink(Protocol):
    """Where pieces of output files go."""

    def start(self) -> None:
        """Called before anything else."""

    def lease(self) -> memoryview:
        """PIECE bytes of aligned memory. Raises what an earlier write failed with."""

    def release(self, buffer: memoryview) -> None:
        """Take back a leased buffer that will not be written: without it somebody would wait for ever."""

    def commit(
        self, number: int, offset: int, buffer: memoryview, size: int, origin: Origin | None, made: Made | None
    ) -> None:
        """Write the first `size` bytes of a leased buffer to output file `number`, sooner or later; `made` is what is
        known of the block that they are the last of."""

    def finish(self) -> None:
        """Return when everything is written. Raises what a write failed with."""

    def keep(self) -> None:
        """After a failure: make what there is last until another run goes on with it."""

    def close(self) -> None:
        """Let go of everything, finished or not."""


class Buffers:
    """So many aligned buffers of PIECE bytes."""

    def __init__(self, count: int) -> None:
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(aligned_buffer(PIECE))

    def lease(self) -> memoryview:
        """A free buffer, as soon as there is one."""
        return self._free.get()

    def release(self, buffer: memoryview) -> None:
        """The buffer is free again."""
        self._free.put(buffer)


class WriteBehind(Buffers):
    """Buffers, and the threads that do the writing.

    Ends are waited for on a condition, not by joining threads: a join that a signal handler interrupts by an exception
    takes the thread for finished (in Python 3.11), and what it writes afterwards would be left behind.
    """

    def __init__(self, buffers: int) -> None:
        super().__init__(buffers)
        self._pool = ThreadPool(WRITERS, "write")
        self._failure: BaseException | None = None
        self._closing = False
        self._under_way = 0
        self._changed = threading.Condition()

    def lease(self) -> memoryview:
        """A free buffer, as soon as there is one; raises what an earlier write failed with."""
        buffer = super().lease()
        if self._failure:
            self.release(buffer)
            raise self._failure
        return buffer

    def submit(self, buffer: memoryview, write: Callable[[], None]) -> None:
        """Do `write` on another thread, and free the buffer afterwards."""
        with self._changed:
            self._under_way += 1
        self._pool.submit(self._write, buffer, write)

    def _write(self, buffer: memoryview, write: Callable[[], None]) -> None:
        try:
            if not (self._failure or self._closing):
                write()
        except BaseException as error:
            self._failure = self._failure or error
        finally:
            self.release(buffer)
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way)

    def finish(self) -> None:
        """Wait for every write; raises what one failed with."""
        self._wait()
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Drop the writes that have not begun, and wait for those that have."""
        self._closing = True
        self._wait()
        self._pool.shutdown(wait=True)
