"""Memory and threads: what a process needs before it can do anything, and what the system may refuse it.

A thread that cannot be started is an error when a pool is made, and not when there is work for it already, which
somebody would wait for without end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from streammerge.core.errors import MachineError
from streammerge.core.io import ALIGNMENT
from streammerge.core.syscalls import new_memory
from streammerge.core.text import size_text

ADVICE = "`--jobs 1` and a smaller `--memory` need less; or raise the limit (`ulimit -a`, or that of the container)"


def aligned_buffer(size: int) -> memoryview:
    """New memory that direct reads and writes may use, of at least `size` bytes and a multiple of ALIGNMENT. Raises
    MachineError where there is none."""
    try:
        return memoryview(new_memory(max(1, -(-size // ALIGNMENT)) * ALIGNMENT))
    except OSError as error:
        raise MachineError(f"the system gives this process no {size_text(size)} of memory: {error}", ADVICE) from error


def started(name: str, work: Callable[..., object], *arguments: Any) -> threading.Thread:
    """A thread that does `work`, and that the end of the process does not wait for. Raises MachineError where there is
    none."""
    thread = threading.Thread(target=work, args=arguments, name=f"streammerge-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        raise _no_thread(error) from error
    return thread


class ThreadPool(ThreadPoolExecutor):
    """So many threads, all of them started. Raises MachineError where there are fewer."""

    def __init__(self, count: int, name: str) -> None:
        super().__init__(count, thread_name_prefix=f"streammerge-{name}")
        all_there = threading.Event()
        try:
            for _ in range(count):  # each waits until all are there: so each is given to a new thread
                self.submit(all_there.wait)
        except RuntimeError as error:
            self.shutdown(wait=False, cancel_futures=True)
            raise _no_thread(error) from error
        finally:
            all_there.set()


def _no_thread(error: RuntimeError) -> MachineError:
    return MachineError(f"the system gives this process no more threads: {error}", ADVICE)
