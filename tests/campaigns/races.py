"""Two runs into one output at the same time, of one merge or of two different ones, with and without locks.

    python -m tests.campaigns.races FOLDER --times N [--without-locks] [--seed S]

Without locks means by turns a file system that says that it has none, and one that grants every lock to everybody; and
in half of these races the runs are stopped before some change to the disk and let go on in turn.
In turn the two are the same merge, different ones, different ones of which the second has `--overwrite`, and any two
that both have it, over the finished result of another merge. Prints one JSON object: how the runs ended, by exit code,
what they were told, and what was wrong.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import streammerge
from streammerge.core import io
from streammerge.core.errors import StreamMergeError
from streammerge.sinks import shards
from tests.campaigns.kills import BLOCK, CHANGES, PIECE, bytes_of
from tests.refusals.making import BASE_CONFIG, INDEX, MARKER, STAGING
from tests.sinks.subjects import make_small, make_subject

APART = 0.5
"""Seconds between the beginnings of two runs, at most: about as long as one takes."""
SLOWER = 0.01
"""Seconds by which an operation is slowed down, at most."""
CHANGES_OF_A_RUN = 110
"""More or less; a run that has fewer is not stopped."""
DONE, REFUSED = 0, 5
KINDS = ("same", "different", "different, one overwrites", "both overwrite")
OTHERS: tuple[Mapping[str, Any], ...] = (
    {"dtype": "float32"}, {"max_shard_size": "1GB"}, {"max_shard_size": "60kB"}, {"weights": [0.5, 2.0, 1.0]},
)  # fmt: skip
"""Merges other than the plain one: of other sizes, of other files, and of the same files with other values."""


def no_locks(*_: object) -> None:
    """A file system that says that it has no locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def locks_for_all(*_: object) -> None:
    """A file system that grants every lock to everybody."""


def slow_down(seed: int) -> None:
    """Let what changes the output, or looks at it, take up to some milliseconds, so that more happens in between."""
    times = random.Random(seed)

    def slowly(real: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(times.uniform(0, SLOWER))
            return real(*arguments, **options)

        return slow

    for name in ("rename", "remove", "make_dirs", "exists", "list_dir", "list_tree", "read_file", "write_new"):
        setattr(io, name, slowly(getattr(io, name)))


def stop_before(at: int) -> None:
    """Let this process stop before its n-th change to the disk, until it is told to go on."""
    count = itertools.count(1)

    def stopping(real: Callable[..., Any]) -> Callable[..., Any]:
        def stop(*arguments: Any, **options: Any) -> Any:
            if next(count) == at:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(*arguments, **options)

        return stop

    for name in CHANGES:
        setattr(io, name, stopping(getattr(io, name)))


@dataclass(frozen=True, slots=True)
class Merge:
    """One of the commands of a race."""

    options: Mapping[str, Any]
    overwrite: bool = False

    @property
    def command(self) -> dict[str, Any]:
        """All options."""
        return {**self.options, "overwrite": self.overwrite}


@dataclass(slots=True)
class Run:
    """A run in a fork of this process: how it ended, and what it was told."""

    root: Path
    options: Mapping[str, Any]
    pid: int = 0
    code: int = -1
    said: str = ""

    def begin(
        self,
        merge: Callable[..., object],
        flock: Callable[..., None] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin, with other locks, and after `before`."""
        self.pid = os.fork()
        if self.pid:
            return
        code, said = 1, ""
        try:
            if flock:
                fcntl.flock = flock  # type: ignore[assignment]
            before()
            merge(**self.options)
            code = 0
        except StreamMergeError as error:
            code, said = error.exit_code, f"{type(error).__name__}: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            (self.root / f"said.{os.getpid()}").write_text(said)
            os._exit(code)

    def stopped(self) -> None:
        """Wait until it stops, or ends."""
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def end(self) -> Run:
        """Let it go on, and wait for the end."""
        os.kill(self.pid, signal.SIGCONT)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        note = self.root / f"said.{self.pid}"
        self.said = note.read_text()
        note.unlink()
        return self


@dataclass(slots=True)
class Campaign:
    """The inputs, what every merge of them comes to, and what was seen."""

    root: Path
    random: random.Random
    locks: bool
    base: Path = Path()
    adapters: list[Path] = field(default_factory=list)
    healthy: dict[str, dict[str, bytes]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.base, self.adapters = make_subject(self.root, "BF16")
        for options in ({}, *OTHERS):
            out = self.root / "healthy"
            run = self.alone(options, out)
            assert run.code == DONE, run.said
            self.healthy[str(options)] = bytes_of(out)
            shutil.rmtree(out)

    @property
    def out(self) -> Path:
        """Where all runs write."""
        return self.root / "out"

    def merge(self, out: Path | None = None, **options: Any) -> None:
        """The command."""
        streammerge.merge(self.base, self.adapters, out or self.out, workers=2, **options)

    def alone(self, options: Mapping[str, Any], out: Path | None = None) -> Run:
        """A run that nobody disturbs, to its end."""
        run = Run(self.root, {**options, "out": out})
        run.begin(self.merge)
        return run.end()

    def race(self, number: int) -> None:
        """One race, and what has to hold after it."""
        kind = KINDS[number % len(KINDS)]
        flock = None if self.locks else (no_locks, locks_for_all)[number // len(KINDS) % 2]
        merges = [Merge({}), Merge({})]
        if kind != "same":
            merges[1] = Merge(self.random.choice(OTHERS), overwrite=kind != "different")
        there = self.clear(kind)
        if kind == "both overwrite":
            merges = [Merge(merge, overwrite=True) for merge in self.random.choices(({}, *OTHERS[1:]), k=2)]
        runs = [Run(self.root, merge.command) for merge in merges]
        moments = self.stops(runs, flock) if flock and self.random.random() < 0.5 else self.apart(runs, flock)
        codes = tuple(run.end().code for run in runs)
        self.ended[f"{kind}: {' '.join(map(str, codes))}"] += 1
        how = flock.__name__ if flock else "locks"
        case = f"race {number}, {moments}, {how}, {kind}, {[merge.command for merge in merges]}: {codes}"
        for run in runs:
            if run.said:
                self.told[without_names(run.said, self.root)] += 1
            if run.code not in (DONE, REFUSED):
                self.wrong.append(f"{case}: {run.said[:300]}")
        self.judge(case, merges, codes, there)

    def clear(self, kind: str) -> dict[str, bytes]:
        """Make the output ready for a race: nothing, or the result of another merge."""
        shutil.rmtree(self.out, ignore_errors=True)
        there = self.healthy[str(OTHERS[0])] if kind == "both overwrite" else {}
        for name, data in there.items():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            (self.out / name).write_bytes(data)
        return there

    def apart(self, runs: list[Run], flock: Callable[..., None] | None) -> str:
        """Let two runs begin one after the other, both of them slowed down."""
        delay = 0.0 if self.random.random() < 0.25 else self.random.uniform(0, APART)
        for run, after in zip(runs, (0.0, delay), strict=True):
            seed = self.random.getrandbits(32)
            run.begin(self.merge, flock, lambda seed=seed, after=after: (slow_down(seed), time.sleep(after)))  # type: ignore[misc]
        return f"{delay:.3f} s apart"

    def stops(self, runs: list[Run], flock: Callable[..., None]) -> str:
        """Stop the first run somewhere, let the second one go on to some point, then the first one to its end."""
        moments = [self.random.randint(1, CHANGES_OF_A_RUN) for _ in runs]
        for run, at in zip(runs, moments, strict=True):
            run.begin(self.merge, flock, lambda at=at: stop_before(at))  # type: ignore[misc]
            run.stopped()
        return f"stopped before changes {moments}"

    def judge(self, case: str, merges: list[Merge], codes: tuple[int, ...], there: Mapping[str, bytes]) -> None:
        """The output is one of the merges, what was there before, or nothing that a loader takes; who says that it is
        done is right unless it was replaced; and one of the commands finishes what is left."""
        found = {name: data for name, data in bytes_of(self.out).items() if not name.startswith(f"{STAGING}/")}
        results = [self.healthy[str(merge.options)] for merge in merges]
        if MARKER in found and found not in (*results, there):
            self.wrong.append(f"{case}: a mixture: {unlike(found, results)}")
        if MARKER not in found and (BASE_CONFIG in found or INDEX in found):
            self.wrong.append(f"{case}: a loader takes {sorted(found)}")
        done = [result for result, code in zip(results, codes, strict=True) if code == DONE]
        if done and found not in done:
            self.wrong.append(f"{case}: said to be done, and is not there: {sorted(found)}")
        if codes == (DONE, DONE) and results[0] != results[1] and not any(merge.overwrite for merge in merges):
            self.wrong.append(f"{case}: both said to be done")
        after = []
        for merge, result in zip(merges, results, strict=True):
            run = self.alone(merge.command)
            after.append(run.said or "done")
            if run.code == DONE and bytes_of(self.out) == result:
                return
        self.wrong.append(f"{case}: neither command finishes it: {after}")


def unlike(found: Mapping[str, bytes], results: list[dict[str, bytes]]) -> list[list[str]]:
    """The files that differ from each of the results."""
    return [sorted(n for n in {*found, *result} if found.get(n) != result.get(n)) for result in results]


def without_names(said: str, root: Path) -> str:
    """A message without what differs from race to race."""
    text = re.sub(r"\d{3,}", "N", said.partition("\n")[0].replace(str(root), ""))
    return re.sub(r"`[^`]*`", "`...`", text)


def main() -> None:
    """Run as many races as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-locks", action="store_true")
    arguments = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    make_small(patch, piece=PIECE, block=BLOCK)
    patch.setattr(shards, "AT_RISK", 2 * BLOCK)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(arguments.folder, random.Random(arguments.seed), locks=not arguments.without_locks)
    for number in range(arguments.times):
        campaign.race(number)
    found = {
        "campaign": "races",
        "points": arguments.times,
        "ended": campaign.ended,
        "told": campaign.told,
        "wrong": campaign.wrong,
        "seconds": round(time.monotonic() - began, 1),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
