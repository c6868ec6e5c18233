"""Kill a run before its n-th change to the disk, for every n, and run the same command again.

    python -m tests.campaigns.kills LAYOUT FOLDER [--step N] [--twice]

A process of its own: it loads torch once, computes nothing, and forks a child for every run, so that a point costs some
ten milliseconds. Prints one JSON object: how many operations a run has, how many points were tried, and what was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.core import io
from streammerge.sinks import shards
from tests.refusals.making import BASE_CONFIG, INDEX, MARKER, STAGING, inputs_at
from tests.sinks.subjects import make_small, make_subject

CHANGES = (
    "create", "open_again", "open_journal", "append", "open_lock", "allocate", "clone", "write_at", "sync_file",
    "rename", "sync_dir", "remove", "remove_dir_if_empty", "make_dirs",
)  # fmt: skip
"""The functions of `core/io.py` that change something below the output, or make it last."""
KILLED = 77
PIECE, BLOCK = 2**13, 2**14


class Killer:
    """Counts changes, and ends the process before the n-th; a write may be cut in half first."""

    def __init__(self, at: int = 0, *, torn: bool = False) -> None:
        self.at, self.torn, self.count = at, torn, 0
        self._lock = threading.Lock()
        for name in CHANGES:
            setattr(io, name, self._counted(name, getattr(io, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                if self.count == self.at:
                    if self.torn and name == "write_at":
                        fd, _, offset, data = arguments[:4]
                        os.pwrite(fd, memoryview(data)[: len(data) // 2 // 4096 * 4096], offset)
                    elif self.torn and name == "append":
                        os.write(arguments[0], arguments[2][: len(arguments[2]) // 2])
                    os._exit(KILLED)
            return real(*arguments, **options)

        return counted


class Layout:
    """A merge, and what may lie in its output before."""

    def __init__(self, name: str, root: Path) -> None:
        self.root, self.out, self.options = root, root / "out", {"workers": 2}
        self.before: dict[str, Any] | None = None
        if name == "subject":
            base, self.adapters = make_subject(root, "BF16")
        else:
            base, adapter = inputs_at(root)
            self.adapters = [adapter]
        self.base = base
        match name:
            case "one file":
                self.options["max_shard_size"] = "1GB"
            case "hashes":
                self.options["sha256"] = True
            case "overwrite":
                self.before, self.options["overwrite"] = {"dtype": "float32"}, True
            case "buffered":
                self.options["io"] = "buffered"

    def prepare(self) -> None:
        """The output as it is before the first run."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.root / "before", self.out)

    def merge(self, out: Path, **options: Any) -> None:
        """The command."""
        streammerge.merge(self.base, self.adapters, out, **{**self.options, **options})


def child(work: Callable[[], None]) -> int:
    """Do `work` in a fork of this process; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"child: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


class Campaign:
    """All points of one layout."""

    def __init__(self, name: str, root: Path) -> None:
        self.layout, self.wrong = Layout(name, root), []
        if self.layout.before is not None:
            options = {**self.layout.before, "overwrite": False}
            assert child(lambda: self.layout.merge(root / "before", **options)) == 0
        assert child(lambda: self.layout.merge(root / "healthy")) == 0
        self.healthy = bytes_of(root / "healthy")
        self.old = bytes_of(root / "before") if self.layout.before is not None else {}
        self.operations = self.counted()

    def counted(self) -> int:
        """How many changes a run makes that nobody disturbs."""
        self.layout.prepare()
        note = self.layout.root / "count"

        def run() -> None:
            killer = Killer()
            self.layout.merge(self.layout.out)
            note.write_text(str(killer.count))

        assert child(run) == 0
        return int(note.read_text())

    def run(self, at: int = 0, *, torn: bool = False) -> int:
        """One run, killed before its n-th change if `at` is not 0."""

        def work() -> None:
            if at:
                Killer(at, torn=torn)
            self.layout.merge(self.layout.out)

        return child(work)

    def point(self, *kills: int, torn: bool = False) -> None:
        """Kill a run, and those that follow it, and let the last one finish."""
        self.layout.prepare()
        for at in kills:
            if self.run(at, torn=torn) not in (0, KILLED):
                self.wrong.append(f"killed at {kills}: a run failed")
            self.look(kills)
        if self.run() != 0:
            self.wrong.append(f"killed at {kills}: the last run failed")
        found = bytes_of(self.layout.out)
        if found != self.healthy:
            differing = sorted(n for n in {*found, *self.healthy} if found.get(n) != self.healthy.get(n))
            self.wrong.append(f"killed at {kills}: the result differs in {differing}")

    def look(self, kills: tuple[int, ...]) -> None:
        """Whether what is there now is what a loader may see: nothing, what was there before, or the result."""
        there = {name: data for name, data in bytes_of(self.layout.out).items() if not name.startswith(STAGING + "/")}
        loadable = BASE_CONFIG in there and (INDEX in there or "model.safetensors" in there)
        if not (loadable or MARKER in there):
            return
        for whole in (self.healthy, self.old):
            late = {INDEX, BASE_CONFIG, MARKER} if MARKER not in there else set()
            if whole and all(
                there.get(name) == data for name, data in whole.items() if name in there or name not in late
            ):
                return
        self.wrong.append(f"killed at {kills}: a loader takes {sorted(there)}")


def main() -> None:
    """Run the campaign that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("layout")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, default=1, help="every n-th point only")
    parser.add_argument("--twice", type=int, default=0, help="so many kills of the run that follows each kill, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    make_small(patch, piece=PIECE, block=BLOCK)
    patch.setattr(shards, "AT_RISK", 2 * BLOCK)
    campaign = Campaign(arguments.layout, arguments.folder)
    points = 0
    for at in range(1, campaign.operations + 1, arguments.step):
        points += 1
        campaign.point(at, torn=at % 2 == 0)
        for again in range(1, arguments.twice + 1):
            points += 1
            campaign.point(at, 1 + again * campaign.operations // (arguments.twice + 1))
    sys.stdout.write(json.dumps({"operations": campaign.operations, "points": points, "wrong": campaign.wrong}))


if __name__ == "__main__":
    main()
