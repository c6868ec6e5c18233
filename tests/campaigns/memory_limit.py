"""The real command in a memory cgroup: one it fits into, one that kills it at once, and one that others fill up.

    python -m tests.campaigns.memory_limit FOLDER [--size SIZE] [--limit LIMIT] [--kills N]

A base of one shard which is larger than the limit is merged within it. Then the kernel kills the command: in a cgroup
that not even its libraries fit into, and at `--kills` points of its way, when another process of its cgroup takes what
there is. The same command, with the memory it needs, finishes each time with the same bytes. Prints the memory that was
charged at the worst moment, page cache included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streammerge.core.text import parse_size
from tests.campaigns.mounts import Refused
from tests.campaigns.watching import differing, digest_of, snapshot, wrongly_loadable

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))

from cgroups import Cgroup, memory_cgroup  # noqa: E402

TOO_SMALL = 120 * 10**6
"""Bytes that Python fits into, and torch does not."""
BALLOON = """
import time
taken = []
while True:
    taken.append(b"x" * 2**23)
    time.sleep(0.002)
"""
PATIENCE = 300.0
Contents = dict[str, str]


def contents(root: Path) -> Contents:
    """SHA-256 of every file below a directory."""
    return {str(path.relative_to(root)): digest_of(path) for path in sorted(root.rglob("*")) if path.is_file()}


class Limited:
    """One merge by the real command, in one cgroup after the other."""

    def __init__(self, folder: Path, size: str, limit: int) -> None:
        made = [sys.executable, BENCH / "make_base.py", folder, "--size", size, "--shard-size", "1TB"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        self.base, self.adapter, self.out, self.limit = folder / "base", folder / "adapter", folder / "out", limit
        self.shard = max(path.stat().st_size for path in self.base.iterdir())
        self.before = snapshot(self.base, self.adapter)
        self.wrong: list[str] = []
        self.healthy: Contents = {}
        self.charged = 0

    def begin(self, group: Cgroup | None) -> subprocess.Popen[str]:
        """The command, begun; the first that the kernel kills where memory runs out."""
        words: list[Any] = [sys.executable, "-m", "streammerge", "run", self.base, self.adapter, "-o", self.out]
        command = group.command(words) if group else words
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        return process

    def ended(self, limit: int, meanwhile: Callable[[Cgroup, subprocess.Popen[str]], None] | None = None) -> int:
        """The exit code of the command in a cgroup of its own, or in none where there is no limit."""
        if not limit:
            return finish(self.begin(None))
        with memory_cgroup(limit) as group:
            if isinstance(group, str):
                raise Refused(group)
            process = self.begin(group)
            if meanwhile:
                meanwhile(group, process)
            code = finish(process)
            self.charged = max(self.charged, group.peak())
            return code

    def whole(self, case: str, code: int) -> None:
        """A run that has to have ended well; the output is removed."""
        found = contents(self.out)
        if code != 0:
            self.wrong.append(f"{case}: ended with {code}")
        elif self.healthy and (names := differing(found, self.healthy)):
            self.wrong.append(f"{case}: the result differs in {names}")
        self.healthy = self.healthy or found
        if snapshot(self.base, self.adapter) != self.before:
            self.wrong.append(f"{case}: the inputs were changed")
        shutil.rmtree(self.out, ignore_errors=True)

    def killed(self, case: str, code: int) -> None:
        """A run that has to have been killed."""
        if code != -signal.SIGKILL:
            self.wrong.append(f"{case}: ended with {code}, and was not killed")
        if loaded := wrongly_loadable(contents(self.out), self.healthy):
            self.wrong.append(f"{case}: a loader takes {loaded}")

    def crowded_out(self, share: float) -> int:
        """The exit code of a run whose memory others take when this share of the shard is written."""

        def meanwhile(group: Cgroup, process: subprocess.Popen[str]) -> None:
            until = time.monotonic() + PATIENCE
            while process.poll() is None and written(process) < share * self.shard and time.monotonic() < until:
                time.sleep(0.002)
            other = subprocess.Popen(group.command([sys.executable, "-c", BALLOON]))
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.002)
            other.kill()
            other.wait()

        return self.ended(self.limit, meanwhile)


def finish(process: subprocess.Popen[str]) -> int:
    """Wait for a process, and pass on what it said unless it ended well."""
    said = process.communicate(timeout=PATIENCE)[1]
    if process.returncode:
        sys.stderr.write(said)
    return process.returncode


def written(process: subprocess.Popen[str]) -> int:
    """Bytes that a process has handed to the disk; files are reserved in full before, and say nothing of it."""
    lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def campaign(folder: Path, size: str, limit: int, kills: int) -> dict[str, Any]:
    """All cases, and what was wrong."""
    limited = Limited(folder, size, limit)
    if limited.shard < limit:
        raise Refused(f"a shard of {limited.shard:,} bytes is no more than the limit")
    limited.whole("within the limit", limited.ended(limit))
    charged = limited.charged
    if kills > 1:
        limited.whole("no limit", limited.ended(0))
    limited.killed("a limit that is too small", limited.ended(TOO_SMALL))
    for number in range(kills):
        share = (number + 0.5) / (kills + 1)  # well before the end, which would come first
        limited.killed(f"crowded out at {share:.0%}", limited.crowded_out(share))
        limited.whole(f"after it was crowded out at {share:.0%}", limited.ended(limit))
    kinds = ["a memory cgroup smaller than a shard", "killed for memory (cgroup)", "killed when others took the memory"]
    return {
        "points": 2 + kills, "kinds": kinds, "shard": limited.shard, "limit": limit, "charged": charged,
        "wrong": limited.wrong,
    }  # fmt: skip


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", default="450MB")
    parser.add_argument("--limit", type=parse_size, default="400MB")
    parser.add_argument("--kills", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    found: dict[str, Any] = {"campaign": "memory_limit", "points": 0, "wrong": [], "kinds": []}
    try:
        found |= campaign(arguments.folder, arguments.size, arguments.limit, arguments.kills)
    except Refused as refused:
        found["skipped"] = str(refused)
    sys.stdout.write(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
