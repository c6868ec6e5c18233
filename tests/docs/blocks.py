"""The fenced blocks of a document, and a directory in which a reader could type them in.

`sh` and `python` blocks must end with exit code 0; of a `console` block each `$` line is run, and what it prints is
compared with the lines below it. A block is left out only under a comment that gives the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUN = ("sh", "console", "python")
NOT_RUN = re.compile(r"<!-- not run in the tests: (.+) -->")
LIMIT = 300
"""Seconds after which a block counts as stuck; none takes a tenth of it."""


@dataclass(frozen=True)
class Block:
    """One fenced block; `line` is that of its opening fence, `reason` why it is not run, if it is not."""

    document: str
    line: int
    language: str
    text: str
    reason: str | None


def blocks_of(document: str) -> list[Block]:
    found, lines = [], (ROOT / document).read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        comment = NOT_RUN.fullmatch(lines[start - 1]) if start else None
        text = "\n".join(lines[start + 1 : number])
        found.append(Block(document, start + 1, lines[start][3:], text, comment[1] if comment else None))
        start = None
    assert start is None, f"{document}:{start} is not closed"
    return found


def make_desk(path: Path) -> dict[str, str]:
    """Make `path` a directory to type in: the checkout's scripts, and, first on the PATH, `streammerge` and `python`
    of the interpreter that runs the tests. Returns the environment."""
    (path / "scripts").symlink_to(ROOT / "scripts")
    commands = path.parent / f"{path.name}-bin"
    commands.mkdir()
    for name, arguments in (("streammerge", "-m streammerge"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (commands / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "PYTHONPATH")}
    settings = {"PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | settings | {"PYTHONPATH": str(ROOT)}


def run_block(block: Block, desk: Path, environment: dict[str, str]) -> None:
    """Run one block as its language asks for. Raises AssertionError with what it printed."""
    where = f"{block.document}:{block.line}"
    if block.language == "console":
        for command, wanted in sessions(block.text):
            _, printed = _ran(["bash", "-c", command], desk, environment)
            assert plain(printed) == plain(wanted), f"{where}: $ {command}"
        return
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euc"]
    code, printed = _ran([*command, block.text], desk, environment)
    assert code == 0, f"{where}\n{printed}"


def sessions(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the lines below it."""
    before, *parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
    assert not before, "a console block starts with `$ `"
    for part in parts:
        command, _, printed = part.partition("\n")
        yield command, printed


def plain(printed: str) -> str:
    """`printed` without what differs between machines: the free space."""
    return re.sub(r"\([\d.]+ [kMGT]?B free\)", "(... free)", printed.strip())


def _ran(command: list[str], desk: Path, environment: dict[str, str]) -> tuple[int, str]:
    """The exit code, and stdout and stderr together."""
    ran = subprocess.run(
        command,
        cwd=desk,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=LIMIT,
    )
    return ran.returncode, ran.stdout
