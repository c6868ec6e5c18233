"""Progress for people: a bar in bytes on a terminal, one plain line for each finished file elsewhere.

The bar is huggingface_hub's wrapper of tqdm, so that HF_HUB_DISABLE_PROGRESS_BARS silences it like every other bar of
that ecosystem; it silences the lines as well. Everything goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from typing import Any, TextIO

from streammerge.core.syscalls import redirect_to_nothing
from streammerge.core.text import count_text, printable, size_text
from streammerge.stream import Event

GROUP = "streammerge.merge"
WORDS = {"publish": "publishing", "verify": "verifying"}


class Bar:
    """A progress callback for `merge` and `verify`; may be called from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._quiet = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "TRUE", "YES", "ON")
        self._lock = threading.Lock()
        self._bar: Any = None
        self._done, self._there, self._total, self._began = 0, 0, 0, time.monotonic()

    def __call__(self, event: Event) -> None:
        """Show one event. A terminal that has gone, or a full disk below a log, is no reason to stop: from then on
        nothing is shown."""
        with self._lock:
            try:
                self._show(event)
            except OSError:
                self._quiet, self._terminal, self._bar = True, False, None
                redirect_to_nothing(self._stream.fileno())

    def _show(self, event: Event) -> None:
        match event.kind:
            case "reread":
                self._start(event.bytes, "reading again")
                self._line(f"resuming: {size_text(event.bytes)} were written before, and are read again first")
            case "start":
                self._start(event.bytes, "merging")
            case "bytes":
                self._done += event.bytes
                if self._bar is not None:
                    self._bar.update(event.bytes)
            case "resume":
                self._resume(event)
            case "shard":
                self._shard(event)
            case "verify" if event.bytes:
                self._start(event.bytes, "verifying")
            case _:
                self._phase(WORDS[event.kind])

    def close(self) -> None:
        """End the bar, so that what is printed next has a line of its own."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
            self._bar = None

    def _start(self, total: int, word: str) -> None:
        self.close()
        self._done, self._there, self._total, self._began = 0, 0, total, time.monotonic()
        if self._terminal:
            from huggingface_hub.utils.tqdm import tqdm

            self._bar = tqdm(  # type: ignore[no-untyped-call]
                total=total,
                unit="B",
                unit_scale=True,
                desc=word,
                name=GROUP,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )

    def _resume(self, event: Event) -> None:
        """What is there already moves the bar, and says nothing of the speed."""
        self._there = event.bytes
        if self._bar is not None:
            self._bar.update(event.bytes)
        blocks = count_text(event.count, "block")
        self._line(f"resuming: {size_text(event.bytes)} are there already, {blocks} read again and found good")

    def _shard(self, event: Event) -> None:
        if self._bar is not None:
            self._bar.set_description_str(f"{event.number}/{event.count} {printable(event.file)}"[:40])
            return
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = self._done / seconds
        done = self._done + self._there
        left = (self._total - done) / rate if rate else 0
        share = done / self._total if self._total else 1
        file = f"{event.number}/{event.count} {printable(event.file)}  {size_text(event.bytes)}"
        self._line(f"{file}  {share:.0%}  {size_text(rate)}/s  {duration_text(left)} left")

    def _phase(self, word: str) -> None:
        if self._bar is not None:
            self._bar.set_description_str(word)

    def _line(self, text: str) -> None:
        if not self._quiet and not self._terminal:
            self._stream.write(f"{text}\n")
            self._stream.flush()


def duration_text(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
