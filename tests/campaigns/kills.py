"""Kill a run before its n-th change to the disk, for every n, and run the same command again.

    python -m tests.campaigns.kills FOLDER [--only LAYOUT ...] [--step N] [--twice N]

A process of its own: it loads torch once and forks a child for every run, so that a point costs a tenth of a second.
After some kills, what was written is damaged as well before the next run. The order checker looks on in every run, and
the inputs are looked at after every point. Prints one JSON object: how many operations a run has in every layout, how
many points and pairs of kills were tried, and what was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from streammerge.core import io
from streammerge.core.errors import StreamMergeError
from streammerge.sinks import shards
from streammerge.sinks.journal import JOURNAL
from tests.campaigns.layouts import LAYOUTS, Layout, roots_of
from tests.campaigns.order import ORDER
from tests.campaigns.watching import differing, snapshot, wrongly_loadable
from tests.refusals.making import STAGING
from tests.sinks.subjects import make_small

CHANGES = (
    "create", "open_again", "open_journal", "append", "open_lock", "allocate", "clone", "write_at", "sync_file",
    "rename", "sync_dir", "remove", "remove_dir_if_empty", "make_dirs", "make_dirs_of",
)  # fmt: skip
"""The functions of `core/io.py` that change something below the output, or make it last."""
KILLED, OUT_OF_ORDER, REFUSED = 77, 78, 79
PIECE, BLOCK = 2**13, 2**14
DAMAGED_EVERY = 3
"""One point in so many is damaged before the next run."""
KINDS = ("killed", "killed twice", "torn write", "torn journal", "staged bytes damaged", "journal damaged")


class Killer:
    """Counts changes, and ends the process before the n-th; a write may be cut in half first."""

    def __init__(self, at: int = 0, *, torn: bool = False) -> None:
        self.at, self.torn, self.count = at, torn, 0
        self.names: list[str] = []
        self._lock = threading.Lock()
        for name in CHANGES:
            setattr(io, name, self._counted(name, getattr(io, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.count += 1
                self.names.append(name)
                if self.count == self.at:
                    if self.torn and name == "write_at":
                        fd, _, offset, data = arguments[:4]
                        os.pwrite(fd, memoryview(data)[: len(data) // 2 // 4096 * 4096], offset)
                    elif self.torn and name == "append":
                        os.write(arguments[0], arguments[2][: len(arguments[2]) // 2])
                    self.end()
            return real(*arguments, **options)

        return counted

    def end(self) -> NoReturn:
        """End the process."""
        os._exit(verdict(KILLED))


def verdict(code: int) -> int:
    """The exit code of a run, unless it did something too early."""
    if ORDER.wrong:
        sys.stderr.write("".join(f"out of order: {found}\n" for found in ORDER.wrong))
        sys.stderr.flush()
    return OUT_OF_ORDER if ORDER.wrong else code


def child(work: Callable[[], None]) -> int:
    """Do `work` in a fork of this process; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ORDER.clear()
            work()
            code = verdict(0)
        except BaseException as error:
            code = verdict(REFUSED) if isinstance(error, StreamMergeError) else 1
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
        layout = self.layout
        if layout.before is not None:
            assert child(lambda: layout.merge(root / "before", **{**layout.before, "overwrite": False})) == 0
        assert child(lambda: layout.merge(root / "healthy")) == 0
        self.healthy = bytes_of(root / "healthy")
        self.old = bytes_of(root / "before") if layout.before is not None else {}
        if layout.began is not None:
            options = {**layout.began, "overwrite": False}
            assert self.run(len(self.counted(options)) * 2 // 3, **options) == KILLED
            layout.out.rename(root / "before")
        self.changes = self.counted({})
        self.operations = len(self.changes)
        self._inputs = snapshot(*roots_of(layout))

    def counted(self, options: dict[str, Any]) -> list[str]:
        """The changes, by their names, that a run makes which nobody disturbs."""
        if (self.layout.root / "before").exists() or not options:
            self.layout.prepare()
        note = self.layout.root / "count"

        def run() -> None:
            killer = Killer()
            self.layout.merge(self.layout.root / "counted" if options else self.layout.out, **options)
            note.write_text(" ".join(killer.names))

        assert child(run) == 0
        return note.read_text().split()

    def run(self, at: int = 0, *, torn: bool = False, **options: Any) -> int:
        """One run, killed before its n-th change if `at` is not 0."""

        def work() -> None:
            if at:
                Killer(at, torn=torn)
            self.layout.merge(self.layout.out, **options)

        return child(work)

    def point(self, *kills: int, torn: bool = False, damaged: bool = False) -> bool:
        """Kill a run, and those that follow it, and let the last one finish; whether all of them came to be killed."""
        self.layout.prepare()
        case = f"{self.layout.root.name}, killed at {kills}{', torn' if torn else ''}{', damaged' if damaged else ''}"
        codes = []
        for at in kills:
            codes.append(self.run(at, torn=torn))
            if codes[-1] not in (0, KILLED):
                self.wrong.append(f"{case}: a run failed with {codes[-1]}")
            self.look(kills)
            if damaged:
                damage(self.layout.out / STAGING)
        if (code := self.run()) != 0:
            self.wrong.append(f"{case}: the last run failed with {code}")
        found = bytes_of(self.layout.out)
        if found != self.healthy:
            self.wrong.append(f"{case}: the result differs in {differing(found, self.healthy)}")
        if snapshot(*roots_of(self.layout)) != self._inputs:
            self.wrong.append(f"{case}: the inputs were changed")
        return set(codes) == {KILLED}

    def look(self, kills: tuple[int, ...]) -> None:
        """Whether what is there now is what a loader may see: nothing, what was there before, or the result."""
        taken = wrongly_loadable(bytes_of(self.layout.out), self.healthy, self.old)
        if taken:
            self.wrong.append(f"{self.layout.root.name}, killed at {kills}: a loader takes {taken}")

    def linked(self) -> None:
        """Somebody puts a link where a killed run left its journal: nothing is written through it."""
        self.layout.prepare()
        self.run(self.operations * 2 // 3)
        victim = self.layout.root / "victim"
        for journal in list((self.layout.out / STAGING).rglob(JOURNAL)):
            journal.rename(victim)
            journal.symlink_to(victim)
            before = victim.read_bytes()
            if (code := self.run()) not in (0, REFUSED):  # 0 where nothing was left to write down
                self.wrong.append(f"{self.layout.root.name}, journal is a link: the run ended with {code}")
            if victim.read_bytes() != before:
                self.wrong.append(f"{self.layout.root.name}, journal is a link: it was written through")
        for journal in list((self.layout.out / STAGING).rglob(JOURNAL)):  # the run has taken the folder over
            journal.unlink()
        if self.run() != 0 or bytes_of(self.layout.out) != self.healthy:
            self.wrong.append(f"{self.layout.root.name}, journal was a link: the next run does not mend it")

    def points(self, step: int, twice: int) -> tuple[int, int]:
        """Every `step`-th kill, and `twice` second ones for each; how many points and pairs that were."""
        generator = random.Random(self.layout.root.name)
        self.linked()
        points, pairs = 1, 0
        for at in range(1, self.operations + 1, step):
            points += 1
            self.point(at, torn=at % 2 == 0, damaged=at // step % DAMAGED_EVERY == 0)
            for _ in range(twice):
                again = generator.randrange(1, max(12, self.operations - at + 8))
                pairs += self.point(at, again, torn=generator.random() < 0.5, damaged=generator.random() < 0.2)
        return points, pairs


def damage(staging: Path) -> None:
    """Change a byte in the middle of every weight file in the making, and a measurement in every journal."""
    for path in staging.rglob("*.safetensors*"):
        with path.open("r+b") as stream:
            size = path.stat().st_size
            stream.seek(size // 2)
            byte = stream.read(1)
            stream.seek(size // 2)
            stream.write(bytes([byte[0] ^ 0x10]) if byte else b"")
    for path in staging.rglob(JOURNAL):
        path.write_bytes(re.sub(rb'"0x1\.[0-7]', b'"0x1.9', path.read_bytes(), count=1))


def prepared() -> pytest.MonkeyPatch:
    """This process made ready to fork runs of small pieces from: one thread, the order checker on."""
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    make_small(patch, piece=PIECE, block=BLOCK)
    patch.setattr(shards, "AT_RISK", 2 * BLOCK)
    ORDER.install()
    return patch


def warm_up(campaign: Campaign) -> None:
    """Load here once what every run loads: with one thread, a fork takes no harm from what was computed before it."""
    campaign.layout.merge(campaign.layout.root / "warm", verify=True)
    gc.collect()
    gc.freeze()


def main() -> None:
    """Run the campaign on the layouts that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument("--step", type=int, default=1, help="every n-th point only")
    parser.add_argument("--twice", type=int, default=0, help="so many kills of the run that follows each kill, too")
    arguments = parser.parse_args()
    prepared()
    began = time.monotonic()
    figures: dict[str, Any] = {"campaign": "kills", "points": 0, "pairs": 0, "layouts": {}, "kinds": KINDS, "wrong": []}
    for name in arguments.only:
        (arguments.folder / name).mkdir(parents=True)
        campaign = Campaign(name, arguments.folder / name)
        warm_up(campaign)
        points, pairs = campaign.points(arguments.step, arguments.twice)
        figures["points"] += points
        figures["pairs"] += pairs
        figures["layouts"][name] = campaign.operations
        figures["wrong"] += campaign.wrong
    sys.stdout.write(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}) + "\n")


if __name__ == "__main__":
    main()
