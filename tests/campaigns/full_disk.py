"""Disks that are too small, that somebody else fills while a run goes on, or that do not take everything.

    python -m tests.campaigns.full_disk FOLDER [--points N] [--seed S]

On a tmpfs and on an ext4: one that is too small from the beginning, where nothing may be begun, and one that is filled
before the n-th change that a run makes, to the last byte or but for a little (`--points` of these). Then what else a
system can refuse: more files, larger files, more open files, a disk that is read-only, a directory that nothing may be
put into. Every run ends with the documented exit code and a message that names the path, and leaves nothing that a
loader would take; when there is room again, the same command finishes with the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from streammerge import api
from streammerge.sinks.directory import INPUTS
from tests.campaigns.kills import Killer, bytes_of, child
from tests.campaigns.mounted import run
from tests.campaigns.mounts import MIB, LoopDisk, bound, do, memory_disk
from tests.campaigns.watching import READS, WRITES, command, differing, problems_of, snapshot
from tests.refusals.making import Outcome
from tests.sinks.subjects import make_subject

SIZE = 24 * MIB
ROOM = (0, 4096, 3 * 4096, 2**16, 2**18)
"""Bytes that whoever fills a disk leaves free."""
SMALL = (0, 2**16, 2**18, 2**19 - 2**15)
"""Bytes that are free on a disk which is too small: the result has half a megabyte."""
FILES = (2, 3, 4, 6, 8, 11)
"""Files that a disk takes, with its first directory."""
LARGEST = (2**12, 2**16, 2**17, 2**18)
"""Bytes of the largest file that a process may write."""
OPEN = (3, 4, 5, 6, 8, 10, 14)
"""Files that a process may open, beside those that it has: two watch for signals, and one is for loading modules."""
MANY = 20
"""With fewer points than these, a third of the other cases is tried."""
GET_FLAGS, SET_FLAGS, IMMUTABLE = 0x80086601, 0x40086602, 0x10
"""ioctl FS_IOC_GETFLAGS, FS_IOC_SETFLAGS and FS_IMMUTABLE_FL: not even root puts anything into such a directory."""
Before = Callable[[], object]


class Filler(Killer):
    """Fills a disk before the n-th change, but for `room` bytes, and lets the run go on."""

    def __init__(self, at: int, disk: Path, room: int) -> None:
        self._disk, self._room = disk, room
        super().__init__(at)

    def end(self) -> None:  # type: ignore[override]
        """It does not end here."""
        fill(self._disk, self._room)


def fill(disk: Path, room: int) -> None:
    """Use up what is free on a disk, but for `room` bytes."""
    fd = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY, 0o600)
    taken = 0
    for step in (MIB, 2**16, 4096):
        with contextlib.suppress(OSError):
            while True:
                taken += os.pwrite(fd, bytes(step), taken)
    os.ftruncate(fd, max(0, taken - room))
    os.fsync(fd)
    os.close(fd)


class Disks:
    """One merge, on one disk after the other."""

    def __init__(self, folder: Path, *, step: int) -> None:
        self.folder, self.step = folder, step
        self.base, self.adapters = make_subject(folder / "inputs", "BF16")
        self.before = snapshot(folder / "inputs")
        self.wrong: list[str] = []
        self.kinds: Counter[str] = Counter()
        self.ended: Counter[int] = Counter()
        note = folder / "count"

        def counted() -> None:
            killer = Killer()
            api.merge(self.base, self.adapters, folder / "healthy", workers=2)
            note.write_text(str(killer.count))

        assert child(counted) == 0
        self.healthy, self.changes = bytes_of(folder / "healthy"), int(note.read_text())

    def run(self, out: Path, before: Before = lambda: None, *options: str) -> Outcome:
        """The command."""
        return command("run", self.base, *self.adapters, "-o", out, "--workers", 2, *options, before=before)

    def refused(
        self, kind: str, case: str, out: Path, before: Before = lambda: None, *options: str, code: int = WRITES
    ) -> Outcome:
        """A run that meets something; it may end well if that was nothing that it needed."""
        done = self.run(out, before, *options)
        self.kinds[kind] += 1
        self.ended[done.code] += 1
        found = bytes_of(out)
        problems = list(problems_of(done, (0, WRITES, code), self.folder, found, self.healthy))
        if "the plan writes" in done.err and str(out.parent) in done.err:
            problems = ["something was begun"] if found else []
        self.wrong += [f"{kind}, {case}: {problem}" for problem in problems]
        return done

    def finished(self, kind: str, case: str, out: Path, *options: str) -> None:
        """The same command, when nothing is in its way."""
        again = self.run(out, lambda: None, *options)
        if again.code or (names := differing(bytes_of(out), self.healthy)):
            what = f"ended with {again.code}: {again.err}" if again.code else f"differs in {names}"
            self.wrong.append(f"{kind}, {case}: the next run {what}")
        if snapshot(self.folder / "inputs") != self.before:
            self.wrong.append(f"{kind}, {case}: the inputs were changed")
        shutil.rmtree(out, ignore_errors=True)

    def too_small(self, name: str, disk: Path) -> None:
        """Full before the beginning."""
        for room in SMALL[:: self.step]:
            fill(disk, room)
            kind, case = f"{name} too small from the beginning", f"{room:,} bytes free"
            if self.refused(kind, case, disk / "out").code != WRITES:
                self.wrong.append(f"{kind}, {case}: the run was not refused")
            (disk / "filler").unlink()
            self.finished(kind, case, disk / "out")

    def filled(self, name: str, disk: Path, points: int, generator: random.Random) -> None:
        """Filled by somebody else while the run goes on."""
        for number in range(points):
            at, room = 1 + number * self.changes // points, generator.choice(ROOM)
            options = ("--io", "buffered") if generator.random() < 0.5 else ()
            kind, case = f"{name} filled by others meanwhile", f"before change {at}, {room:,} bytes left {options}"
            self.refused(kind, case, disk / "out", lambda at=at, room=room: Filler(at, disk, room), *options)
            (disk / "filler").unlink(missing_ok=True)
            self.finished(kind, case, disk / "out", *options)

    def few_files(self, target: Path) -> None:
        """A disk that takes no more files."""
        for files in FILES[:: self.step]:
            with memory_disk(target, SIZE, files=files) as disk:
                kind, case = "no more files on a tmpfs", f"{files} allowed"
                self.refused(kind, case, disk / "out")
                do("mount", "-o", "remount,nr_inodes=1000", disk)
                self.finished(kind, case, disk / "out")

    def limited(self, out: Path) -> None:
        """A process that may not write large files, or open many."""
        for limit in LARGEST[:: self.step]:
            kind, case = "files above a size", f"{limit:,} bytes"
            self.refused(kind, case, out, lambda limit=limit: limit_to(resource.RLIMIT_FSIZE, limit))
            self.finished(kind, case, out)
        for room in OPEN[:: self.step]:
            kind, case = "too many open files", f"{room} more"
            self.refused(
                kind, case, out, lambda room=room: limit_to(resource.RLIMIT_NOFILE, next_free(room)), code=READS
            )
            self.finished(kind, case, out)

    def closed(self, disk: Path, target: Path) -> None:
        """A disk that is read-only, and a directory that nothing may be put into."""
        (disk / "home").mkdir()
        with bound(disk / "home", target) as seen:
            do("mount", "-o", "remount,bind,ro", seen)
            self.refused("a read-only disk", "from the beginning", seen / "out")
            do("mount", "-o", "remount,bind,rw", seen)
            self.finished("a read-only disk", "from the beginning", seen / "out")
        with immutable(disk / "home"):
            self.refused("an immutable directory", "from the beginning", disk / "home" / "out")
        self.finished("an immutable directory", "from the beginning", disk / "home" / "out")

    def bound_apart(self) -> None:
        """Base and output as mounts of their own on one disk: nothing can be renamed from one to the other."""
        (self.folder / "output").mkdir()
        with bound(self.base, self.folder / "a") as base, bound(self.folder / "output", self.folder / "b") as out:
            done = command("run", base, *self.adapters, "-o", out)
            self.kinds["base and output as mounts of their own"] += 1
            names = [name for name in differing(bytes_of(out), self.healthy) if name != INPUTS]
            if done.code or names:
                self.wrong.append(f"bind mounts: ended with {done.code}, differs in {names}: {done.err}")


def limit_to(what: int, limit: int) -> None:
    """A limit on this process."""
    resource.setrlimit(what, (limit, limit))


def next_free(room: int) -> int:
    """The least number that `room` descriptors which are free now lie below."""
    used = set(map(int, os.listdir("/proc/self/fd")))
    return 1 + [number for number in range(room + len(used)) if number not in used][room - 1]


@contextlib.contextmanager
def immutable(folder: Path) -> Iterator[None]:
    """A directory that cannot be changed for a while."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    flags = struct.unpack("l", fcntl.ioctl(fd, GET_FLAGS, bytes(8)))[0]
    fcntl.ioctl(fd, SET_FLAGS, struct.pack("l", flags | IMMUTABLE))
    try:
        yield
    finally:
        fcntl.ioctl(fd, SET_FLAGS, struct.pack("l", flags))
        os.close(fd)


def campaign(folder: Path, points: int, seed: int) -> dict[str, Any]:
    """All of it, and what was wrong."""
    generator = random.Random(seed)
    disks = Disks(folder, step=1 if points >= MANY else 3)
    with memory_disk(folder / "memory", SIZE) as disk:
        disks.too_small("a tmpfs", disk)
        disks.filled("a tmpfs", disk, points // 2, generator)
    disks.few_files(folder / "few")
    with LoopDisk("ext4", folder / "image", folder / "disk", SIZE) as loop:
        disks.too_small("an ext4", loop.target)
        disks.filled("an ext4", loop.target, points - points // 2, generator)
        disks.closed(loop.target, folder / "home")
        disks.limited(loop.target / "out")
    disks.bound_apart()
    ended = {f"exit code {code}": count for code, count in sorted(disks.ended.items())}
    return {"points": disks.kinds.total(), "kinds": sorted(disks.kinds), "ended": ended, "wrong": disks.wrong}


if __name__ == "__main__":
    run("full_disk", campaign, points=10)
