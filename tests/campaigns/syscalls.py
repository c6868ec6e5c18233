"""The real command, killed by strace at the n-th system call that changes something below its output.

    python -m tests.campaigns.syscalls FOLDER [--points N]

A first run under strace says which calls there are. For each point the command runs again, in a process namespace of
its own, so that all files have the same names, and is killed as it enters that call: told by its name, its path
and how many of them came before. Then the same command, without strace, has to finish. Every run loads torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.kills import bytes_of
from tests.campaigns.mounts import Refused, do, needs
from tests.campaigns.watching import differing, snapshot, wrongly_loadable
from tests.refusals.making import inputs_at

CALLS = (
    "openat", "creat", "write", "pwrite64", "pwritev", "pwritev2", "fallocate", "fsync", "fdatasync", "rename",
    "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "ftruncate", "truncate", "ioctl",
    "copy_file_range", "sync_file_range", "link", "linkat", "symlink", "symlinkat", "chmod", "fchmod", "utimensat",
)  # fmt: skip
"""Every call by which a program may change a file or a directory, or make a change last."""
ONLY_IF = {"openat": "O_CREAT", "ioctl": "FICLONERANGE"}
"""Those that do so in one form only."""
KILLED = 137
PATIENCE = 300
LAYOUTS: dict[str, tuple[str, ...]] = {"new": (), "overwrite": ("--overwrite", "--sha256", "--io", "buffered")}
"""Further options of the command."""
SAME_PATHS = """
from streammerge.cli.main import script
from streammerge.sinks import run_folder
run_folder.RANDOM_BYTES = 0
script()
"""
"""The command, but for the random part in the name of its folder."""
LINE = re.compile(r"(?P<thread>\d+) +(?:(?P<call>\w+)\((?P<rest>.*)|<\.\.\. (?P<resumed>\w+) resumed>(?P<end>.*))")


@dataclass(frozen=True, slots=True)
class Point:
    """The `number`-th call of this name on this path."""

    call: str
    path: str
    number: int


class RealCommand:
    """One merge by the real command, in a folder of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.out = name, folder, folder / "new" / "out"
        self.base, self.adapter = inputs_at(folder)
        self.options, self.wrong, self.missed = LAYOUTS[name], [], 0
        self.old: dict[str, bytes] = {}
        if "--overwrite" in self.options:
            self.run("--dtype", "float32", options=())
            self.old = bytes_of(self.out)
            (folder / "new").rename(folder / "before")
        self.prepare()
        self.points = list(self.listed())
        self.healthy = bytes_of(self.out)
        self.inputs = snapshot(self.base, self.adapter)

    def command(self, *more: str, options: Sequence[str] | None = None, same: bool = False) -> list[str]:
        """What is run; with the `same` paths every time, if strace is to know them."""
        chosen = self.options if options is None else options
        program = ("-c", SAME_PATHS) if same else ("-m", "streammerge")
        named = (sys.executable, *program, "run", self.base, self.adapter, "-o", self.out, "-j", "1")
        return [*map(str, named), *chosen, *more]

    def run(self, *more: str, options: Sequence[str] | None = None) -> None:
        """The command as anybody runs it; RuntimeError with what it said unless it ends well."""
        done = run(self.command(*more, options=options))
        if done.returncode != 0:
            raise RuntimeError(f"ended with {done.returncode}: {done.stderr}")

    def traced(self, *tracing: str) -> subprocess.CompletedProcess[str]:
        """The command under strace, in a process namespace."""
        # Not the first process of it, which is treated unlike others.
        inside = ["unshare", "--pid", "--fork", "sh", "-c", '"$@"; exit $?', "sh", *self.command(same=True)]
        return run(["strace", "--follow-forks", "-qq", *tracing, *inside])

    def prepare(self) -> None:
        """The output as it is before the first run."""
        shutil.rmtree(self.folder / "new", ignore_errors=True)
        if self.old:
            shutil.copytree(self.folder / "before", self.folder / "new")

    def listed(self) -> Iterator[Point]:
        """All points of a run that nobody disturbs, in their order."""
        log = self.folder / "log"
        # Stops at no other call; for injecting it is of no use: a signal that is sent at such a stop never arrives.
        done = self.traced("--seccomp-bpf", "-y", "-s", "0", "-o", str(log), "-e", f"trace={','.join(CALLS)}")
        if done.returncode != 0:
            raise Refused(f"strace cannot follow the command: {done.stderr}")
        seen: Counter[tuple[str, str, str]] = Counter()
        told = set()
        for thread, call, rest, failed in calls_of(log.read_text()):
            path = path_in(rest, str(self.folder / "new"))
            if path is None:
                continue
            seen[thread, call, path] += 1
            point = Point(call, path, seen[thread, call, path])
            if ONLY_IF.get(call, "") in rest and not failed and point not in told:
                told.add(point)
                yield point

    def kill(self, point: Point) -> None:
        """One point, and the run after it."""
        self.prepare()
        inject = f"inject={point.call}:signal=KILL:when={point.number}"
        filters = ("-e", f"trace={point.call}", "-e", inject, "-P", point.path)
        code = self.traced("-o", os.devnull, *filters).returncode
        case = f"{self.name}, {point.call} {point.number} of {point.path}"
        if code == 0:
            self.missed += 1
        elif code != KILLED:
            self.wrong.append(f"{case}: the run ended with {code}")
        if loaded := wrongly_loadable(bytes_of(self.out), self.healthy, self.old):
            self.wrong.append(f"{case}: a loader takes {loaded}")
        try:
            self.run()
        except RuntimeError as error:
            self.wrong.append(f"{case}: the next run {error}")
        if names := differing(bytes_of(self.out), self.healthy):
            self.wrong.append(f"{case}: the result differs in {names}")
        if snapshot(self.base, self.adapter) != self.inputs:
            self.wrong.append(f"{case}: the inputs were changed")


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """A process and what it said."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)


def calls_of(log: str) -> list[tuple[str, str, str, bool]]:
    """The calls in what strace wrote, in their order: thread, name, arguments, and whether it failed."""
    calls: list[tuple[str, str, str, bool]] = []
    under_way: dict[str, int] = {}
    for line in log.splitlines():
        found = LINE.match(line)
        if found is None:
            continue
        thread = found["thread"]
        if found["call"]:
            under_way[thread] = len(calls)
            calls.append((thread, found["call"], found["rest"], ") = -1 " in re.sub(r"\) +=", ") =", found["rest"])))
        elif thread in under_way and re.search(r"\) += -1 ", found["end"]):
            number = under_way[thread]
            calls[number] = (*calls[number][:3], True)
    return calls


def path_in(arguments: str, root: str) -> str | None:
    """The first path at or below `root` among the arguments of a call; None for a file that has lost its name."""
    found = re.search(rf'["<]({re.escape(root)}(?:/[^">]*)?)[">]', arguments)
    return found[1] if found and "/#" not in found[1] else None


def campaign(folder: Path, points: int) -> dict[str, Any]:
    """Points spread over all layouts, and what was wrong."""
    figures: dict[str, Any] = {"points": 0, "calls": {}, "missed": 0, "kinds": [], "wrong": []}
    kinds = set()
    for name in LAYOUTS:
        place = folder / name
        place.mkdir()
        command = RealCommand(name, place)
        figures["calls"][name] = len(command.points)
        count = min(-(-points // len(LAYOUTS)), len(command.points))
        for number in range(count):
            point = command.points[number * len(command.points) // count]
            command.kill(point)
            kinds.add(f"SIGKILL at {point.call} (strace)")
        figures["points"] += count - command.missed
        figures["missed"] += command.missed
        figures["wrong"] += command.wrong
    return figures | {"kinds": sorted(kinds)}


def main() -> None:
    """Run as many points as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int, default=8)
    arguments = parser.parse_args()
    began = time.monotonic()
    found: dict[str, Any] = {"campaign": "syscalls", "points": 0, "wrong": [], "kinds": []}
    try:
        needs("strace", "unshare")
        do("unshare", "--pid", "--fork", "true")
        found |= campaign(arguments.folder.resolve(), arguments.points)
    except Refused as refused:
        found["skipped"] = str(refused)
    sys.stdout.write(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
