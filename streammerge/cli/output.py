"""The only module that prints: results to stdout, everything else to stderr; plain, JSON or quiet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from streammerge.core.errors import StreamMergeError, WriteError
from streammerge.core.syscalls import redirect_to_nothing
from streammerge.core.text import printable, redacted, shortened

REPORT_TO = "this is a bug of streammerge: please report it with the text above and the command"


@dataclass(slots=True)
class Output:
    """How one command speaks. With `--json` a command prints one document, or lines, never both. `lost` is why results
    could not be printed, for when the command is done."""

    json: bool
    quiet: bool
    verbose: bool
    documented: bool = False
    lost: WriteError | None = None

    def _print(self, text: str, stream: TextIO) -> None:
        """A text, at once. A reader that has gone, or a full disk below a log, is no reason to stop what is under way:
        what follows disappears."""
        try:
            print(text, file=stream, flush=True)
        except OSError as error:
            redirect_to_nothing(stream.fileno())
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):  # `head` has had enough
                self.lost = WriteError("standard output", "write to", error.strerror or str(error))

    def result(self, text: str) -> None:
        """A result for people: a path, a table, a sentence."""
        if not self.json:
            self._print(text, sys.stdout)

    def document(self, value: Mapping[str, Any]) -> None:
        """The one JSON document of a command, with `--json`."""
        if self.json:
            self._print(json.dumps(value, indent=2, ensure_ascii=False, default=str), sys.stdout)
            self.documented = True

    def line(self, kind: str, value: Mapping[str, Any]) -> None:
        """One line of a JSON stream, with `--json`."""
        if self.json:
            self._print(json.dumps({"type": kind} | dict(value), ensure_ascii=False, default=str), sys.stdout)

    def note(self, text: str) -> None:
        """A sentence worth knowing, unless quiet."""
        if not self.quiet:
            self._print(f"note: {printable(text)}", sys.stderr)

    def say(self, text: str) -> None:
        """A line about what is happening, unless quiet."""
        if not self.quiet:
            self._print(text, sys.stderr)

    def error(self, error: StreamMergeError) -> None:
        """A refusal or failure: summary, details, one hint. Escaped here once more, so that no class can forget it."""
        mark = "\033[31merror:\033[0m" if _coloured() else "error:"
        self._print(f"{mark} {_line(error.summary())}", sys.stderr)
        for line in error.details():
            self._print(f"  {_line(line)}", sys.stderr)
        if error.hint():
            self._print(f"\nhint: {_line(error.hint())}", sys.stderr)
        if self.json and not self.documented:
            self._print(json.dumps({"type": "error"} | error.data(), ensure_ascii=False, default=str), sys.stdout)

    def bug(self, trace: str) -> None:
        """An exception that is no refusal. Its text is not ours: it may hold a URL, or what a stranger wrote."""
        lines = (printable(line) for line in redacted(trace).split("\n"))
        self._print("\n".join([*lines, REPORT_TO]), sys.stderr)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns padded to their widest cell; `right` lists those that hold numbers."""
    cells = [[*map(printable, row)] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _line(text: str) -> str:
    """What an error says, on one line that a stranger's text cannot make endless."""
    return printable(redacted(shortened(text)))


def _coloured() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")
