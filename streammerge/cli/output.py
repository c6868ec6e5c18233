"""The only module that prints: results to stdout, everything else to stderr; plain, JSON or quiet."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.core.errors import StreamMergeError
from streammerge.core.text import printable

REPORT_TO = "this is a bug of streammerge: please report it with the text above and the command"


@dataclass(slots=True)
class Output:
    """How one command speaks. With `--json` a command prints one document, or lines, never both."""

    json: bool
    quiet: bool
    verbose: bool
    documented: bool = False

    def result(self, text: str) -> None:
        """A result for people: a path, a table, a sentence."""
        if not self.json:
            print(text)

    def document(self, value: Mapping[str, Any]) -> None:
        """The one JSON document of a command, with `--json`."""
        if self.json:
            print(json.dumps(value, indent=2, ensure_ascii=False, default=str))
            self.documented = True

    def line(self, kind: str, value: Mapping[str, Any]) -> None:
        """One line of a JSON stream, with `--json`."""
        if self.json:
            print(json.dumps({"type": kind} | dict(value), ensure_ascii=False, default=str), flush=True)

    def note(self, text: str) -> None:
        """A sentence worth knowing, unless quiet."""
        if not self.quiet:
            print(f"note: {printable(text)}", file=sys.stderr)

    def say(self, text: str) -> None:
        """A line about what is happening, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def error(self, error: StreamMergeError) -> None:
        """A refusal or failure: summary, details, one hint. Escaped here once more, so that no class can forget it."""
        mark = "\033[31merror:\033[0m" if _coloured() else "error:"
        print(f"{mark} {printable(error.summary())}", file=sys.stderr)
        for line in error.details():
            print(f"  {printable(line)}", file=sys.stderr)
        if error.hint():
            print(f"\nhint: {printable(error.hint())}", file=sys.stderr)
        if self.json and not self.documented:
            print(json.dumps({"type": "error"} | error.data(), ensure_ascii=False, default=str), flush=True)

    def bug(self, trace: str) -> None:
        """An exception that is no refusal."""
        print(f"{trace}\n{REPORT_TO}", file=sys.stderr)


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


def _coloured() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")
