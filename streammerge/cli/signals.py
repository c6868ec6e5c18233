"""SIGINT, SIGTERM and SIGHUP as an exception in the main thread, so that a command tidies up and ends with the code
that shells expect.

Tidying up has GRACE seconds. Then, or at another SIGINT, the process ends as it is: whatever state an output is in, the
same command goes on from it. Other signals that follow change nothing: `timeout` and closed terminals send theirs
twice. What was ignored when the process began stays ignored, which is what `nohup` and background jobs count on.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from streammerge.core.errors import Interrupted, MachineError
from streammerge.core.resources import started

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 0.75
"""Seconds. With what the system needs to end a process that is waiting for its disk, less than two."""
REMINDING = 0.02
"""Seconds until an exception that was swallowed is raised again."""
TELLING = 0.25
"""Seconds for the last words of a process whose standard error may have no reader."""


@contextlib.contextmanager
def interruptible(tell: Callable[[Interrupted], None]) -> Iterator[None]:
    """Raise Interrupted in the main thread at the first signal; SIGINT after that ends the process at once. `tell` says
    why it ended where the main thread does not come to it. On another thread than the main one, nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: found for number in HANDLED if (found := signal.getsignal(number)) is not signal.SIG_IGN}

    def interrupt(signum: int, frame: FrameType | None) -> None:
        for number in before:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else _nothing)
        received.append(signum)
        raise Interrupted(received[0])

    def remind() -> None:
        time.sleep(REMINDING)
        if signal.getsignal(signal.SIGTERM) is interrupt:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    complain = sys.unraisablehook

    def unraisable(found: UnraisableHookArgs) -> None:
        """Where Python was just doing something that cannot fail, it swallows the exception: raise it once more."""
        if not isinstance(found.exc_value, Interrupted):
            complain(found)
        elif signal.SIGTERM in before:
            signal.signal(signal.SIGTERM, interrupt)
            _thread.start_new_thread(remind, ())  # takes no lock that may be held here

    with _watched(tell):
        try:
            sys.unraisablehook = unraisable
            for number in before:
                signal.signal(number, interrupt)
            yield
        except Exception as error:
            if received and not isinstance(error, Interrupted):
                raise Interrupted(received[0]) from error  # it was met on the way out, or took the signal for its own
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            sys.unraisablehook = complain


def _nothing(signum: int, frame: FrameType | None) -> None:
    """What is done at a signal that follows another. Not SIG_IGN: Python complains where both came at once."""


@contextlib.contextmanager
def _watched(tell: Callable[[Interrupted], None]) -> Iterator[None]:
    """Within `with`, a thread sees every signal when it comes, whatever the main thread is busy with."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    watcher = started("signals", _watch, receiver, tell)
    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()  # the watcher reads the end, and goes
        watcher.join()
        receiver.close()


def _watch(receiver: socket.socket, tell: Callable[[Interrupted], None]) -> None:
    """Wait for a signal; end the process at SIGINT after that, or when the time is up."""
    first = 0
    while numbers := _received(receiver):
        for number in numbers:
            if first and number == signal.SIGINT:
                _end(first, tell)
            elif not first and number in HANDLED:
                first = number
                receiver.settimeout(GRACE)
    if numbers is None:
        _end(first, tell)


def _received(receiver: socket.socket) -> bytes | None:
    """The signals that came, by number; nothing at the end, None when the time is up."""
    try:
        return receiver.recv(16)
    except TimeoutError:
        return None


def _end(signum: int, tell: Callable[[Interrupted], None]) -> None:
    error = Interrupted(signum)
    with contextlib.suppress(MachineError):  # without a word, then
        started("words", tell, error).join(TELLING)
    os._exit(error.exit_code)
