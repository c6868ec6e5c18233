"""Let the power fail before the n-th change that a run makes to a disk, and run the same command again.

    python -m tests.campaigns.powerloss FOLDER --fs ext4|xfs [--points N] [--seed S] [--control N] [--without-fsync]

The disk is a file system in a file which is shut down without its log, unmounted and mounted again. Just before, an
adversary writes back what it likes of the files there and makes an unrelated file durable, which carries directory
entries along: what the run did not sync itself is then partly there. One point in so many comes after the run has
ended well, where nothing may be lost any more. `--without-fsync` takes the syncs out: wrong states must be found then.
`--control N` does so at N further points, and says that something is wrong where nothing was.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from streammerge.core import io
from tests.campaigns.kills import KILLED, PIECE, Campaign, Killer, bytes_of, child, prepared
from tests.campaigns.mounts import LoopDisk, Refused, keep_mounts_private, shut_down, write_back
from tests.campaigns.order import ORDER
from tests.campaigns.watching import differing, snapshot, warm_up
from tests.refusals.making import STAGING

LAYOUTS = ("subject", "buffered", "overwrite", "hashes", "one file")
POINTS_FOR_A_LAYOUT = 5
"""With fewer points, fewer layouts: each takes some runs of its own before the first."""
ENDED_EVERY = 8
"""One point in so many comes after a run that has ended well."""
WRITE_BACK = 1 | 2 | 4
"""sync_file_range: wait for what is under way, begin, wait for that."""


class PowerCut(Killer):
    """Counts changes, and takes the power from the disk before the n-th, after what the adversary does."""

    def __init__(self, out: Path, at: int, seed: int, *, torn: bool) -> None:
        self._out, self._random = out, random.Random(seed)
        super().__init__(at, torn=torn)

    def end(self) -> NoReturn:
        """The power fails here."""
        self.cut()
        os._exit(KILLED)

    def cut(self) -> None:
        """Some of what was written reaches the disk, and then nothing more."""
        sync_file_range = ctypes.CDLL(None).sync_file_range
        for path in sorted(path for path in self._out.rglob("*") if path.is_file()):
            size = path.stat().st_size
            fd = os.open(path, os.O_RDONLY)
            for _ in range(self._random.randrange(3)):
                first = self._random.randrange(size // io.PAGE + 1) * io.PAGE
                count = self._random.choice((io.PAGE, PIECE, size + 1))
                sync_file_range(fd, ctypes.c_int64(first), ctypes.c_int64(count), WRITE_BACK)
            os.close(fd)
        if self._random.random() < 0.75:
            fd = os.open(self._out.parent / "unrelated", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.write(fd, b"other")
            os.fsync(fd)
            os.close(fd)
        shut_down(self._out.parent)


class Outages(Campaign):
    """All points of one layout on one disk."""

    def __init__(self, name: str, disk: LoopDisk, *, syncs: bool) -> None:
        root = disk.target / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        super().__init__(name, root)
        self.disk, self.syncs = disk, syncs
        self.inputs = [self.layout.base, *self.layout.adapters]
        self.before = snapshot(*self.inputs)

    def cut(self, at: int, seed: int) -> None:
        """One outage: before change `at`, or at the end of the run where there are fewer."""
        self.layout.prepare()
        write_back(self.disk.target)
        case = f"{self.layout.root.name}, cut at {at}, seed {seed}"
        code = child(lambda: self.until_cut(at, seed))
        self.disk.unmount()
        self.disk.mount()
        if code not in (0, KILLED):
            self.wrong.append(f"{case}: the run failed")
        elif code == 0 and (names := [n for n in self.lost() if not n.startswith(f"{STAGING}/")]):
            self.wrong.append(f"{case}: {names} were lost after the run had ended well")
        else:
            self.look_at(case)
        if self.run() != 0:
            self.wrong.append(f"{case}: the next run failed")
        elif names := self.lost():
            self.wrong.append(f"{case}: the result differs in {names}")
        if snapshot(*self.inputs) != self.before:
            self.wrong.append(f"{case}: the inputs were changed")

    def lost(self) -> list[str]:
        """The files that are not what they should be in the end."""
        return differing(bytes_of(self.layout.out), self.healthy)

    def look_at(self, case: str) -> None:
        """What a loader may see, under the name of the case."""
        known = len(self.wrong)
        self.look(())
        self.wrong[known:] = [f"{case}: {found}" for found in self.wrong[known:]]

    def until_cut(self, at: int, seed: int) -> None:
        """In the child: a run up to its outage."""
        if not self.syncs:
            io.sync_file = io.sync_dir = lambda *_: None
        power = PowerCut(self.layout.out, at, seed, torn=seed % 2 == 0)
        self.layout.merge(self.layout.out)
        power.cut()
        if not self.syncs:
            ORDER.clear()  # it is the disk that has to show it


def points_of(operations: int, count: int, generator: random.Random) -> list[int]:
    """Changes to cut before, evenly spread; one point in so many comes after all of them."""
    ends = max(1, count // ENDED_EVERY)
    cuts = max(1, count - ends)
    shift = generator.random()
    return [min(operations, 1 + int((n + shift) * operations / cuts)) for n in range(cuts)] + [operations * 2] * ends


def outages(disk: LoopDisk, count: int, seed: int, *, syncs: bool) -> dict[str, Any]:
    """Every layout in turn, and what was wrong."""
    generator = random.Random(seed)
    figures: dict[str, Any] = {"points": 0, "after the end": 0, "wrong points": 0, "wrong": []}
    layouts = LAYOUTS[: max(1, count // POINTS_FOR_A_LAYOUT)]
    shares = [count // len(layouts) + (n < count % len(layouts)) for n in range(len(layouts))]
    for name, share in zip(layouts, shares, strict=True):
        campaign = Outages(name, disk, syncs=syncs)
        for at in points_of(campaign.operations, share, generator):
            known = len(campaign.wrong)
            campaign.cut(at, generator.randrange(2**31))
            figures["points"] += 1
            figures["wrong points"] += len(campaign.wrong) > known
            figures["after the end"] += at > campaign.operations
        figures["wrong"] += campaign.wrong
    return figures


def main() -> None:
    """Run as many outages as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fs", choices=("ext4", "xfs"), default="ext4")
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--control", type=int, default=0)
    parser.add_argument("--without-fsync", action="store_true")
    arguments = parser.parse_args()
    began = time.monotonic()
    prepared()
    warm_up(arguments.folder / "warm")
    kinds = [f"power loss on {arguments.fs} while writing", f"power loss on {arguments.fs} after the end"]
    found: dict[str, Any] = {"campaign": "powerloss", "kinds": kinds, "points": 0, "wrong": []}
    try:
        keep_mounts_private()
        with LoopDisk(arguments.fs, arguments.folder / "image", arguments.folder / "disk") as disk:
            found |= outages(disk, arguments.points, arguments.seed, syncs=not arguments.without_fsync)
            if arguments.control:
                caught = outages(disk, arguments.control, arguments.seed, syncs=False)["wrong points"]
                found["without fsync"] = {"points": arguments.control, "wrong": caught}
                found["wrong"] += [] if caught else ["nothing was wrong without fsync: the campaign has no teeth"]
    except Refused as refused:
        found |= {"kinds": [], "skipped": str(refused)}
    sys.stdout.write(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
