"""SIGINT, SIGTERM and SIGHUP as exceptions, so that a run tidies up and ends with the code shells expect."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from streammerge.core.errors import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted in the main thread at the first signal; a second one ends the process at once."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        raise Interrupted(signum)

    before = {number: signal.signal(number, interrupt) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
