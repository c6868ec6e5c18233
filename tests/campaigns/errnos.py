"""Fail the n-th system call that a run makes, for every n, and run the same command again.

    python -m tests.campaigns.errnos FOLDER [--only LAYOUT ...] [--step N] [--errnos N]

The calls are failed where the package makes them, below its own handling: the functions of `os`, mapping, reserving,
sharing blocks, locking. Each one fails once, or it and all later ones of its kind; reads and writes are also cut short.
The command's exit code and message are held to what they should say, the output to what a loader may see, and the run
that follows to the bytes of an undisturbed one. Half of the runs begin with nothing, half go on with what another left.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streammerge
from streammerge.core import io, locks
from streammerge.sinks.run_folder import TAKEN
from tests.campaigns.kills import KILLED, Campaign, bytes_of, prepared, verdict, warm_up
from tests.campaigns.layouts import roots_of
from tests.campaigns.order import ORDER
from tests.campaigns.watching import command, differing, snapshot, wrongly_loadable
from tests.refusals.making import Outcome

ERRNOS = (
    errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE,
    errno.EINTR,
)  # fmt: skip
OS_CALLS = (
    "open", "stat", "fstat", "lstat", "readlink", "preadv", "pwrite", "write", "fsync", "replace", "unlink", "rmdir",
    "mkdir", "listdir", "scandir", "statvfs", "sendfile", "posix_fadvise", "close",
)  # fmt: skip
MUST_BE_TOLD = {"pwrite", "write", "fsync", "replace", "mkdir", "fallocate"}
"""Calls whose failure no run may survive: what they should have done is part of the result."""
SHORT = ("half", "odd", "nothing")
"""How many bytes of a read or write are done: half of them in whole pages, all but some odd ones, none."""
CUT = {"preadv", "pwrite", "write"}
COARSER = 10
"""How much larger the steps are on all layouts but the first: most of their calls are the same."""
LAYOUTS = ("sharded", "overwrite", "buffered", "pread", "sidecars", "hashes")
PACKAGE = f"{Path(streammerge.__file__).parent}{os.sep}"
COUNTED: set[str] = set()
"""Further files whose calls count as the package's."""
MESSAGE = re.compile(r"^error: .*`(?P<path>[^`]*)`.*$", re.MULTILINE)
EXIT_CODES = {0, 3, 7}


@dataclass(frozen=True)
class Fault:
    """What happens to call number `at`, and to all later ones of its kind if it is `sticky`; `code` is an errno or one
    of SHORT. With a `kind`, only calls of that are counted."""

    at: int
    code: int | str
    sticky: bool
    kind: str = ""

    def __str__(self) -> str:
        what = errno.errorcode[self.code] if isinstance(self.code, int) else f"short: {self.code}"
        return f"call {self.at}, {what}{', and from then on' if self.sticky else ''}"


class Disturber:
    """Stands between the package and the system, counts the calls, and lets `fault` happen."""

    def __init__(self, fault: Fault | None, note: Path) -> None:
        self.fault, self.note = fault, note
        self.kinds: list[str] = []
        self._kind: str | None = None
        self._made_up_for = False
        self._lock = threading.Lock()
        for name in OS_CALLS:
            setattr(os, name, self._disturbed(name, getattr(os, name), of_package=True))
        io.fallocate = self._disturbed("fallocate", io.fallocate)
        io.clone_range = self._disturbed("clone", io.clone_range)
        io.mmap = _Mapping(self._disturbed("mmap", mmap.mmap, of_package=True))
        locks.fcntl = _Locking(self._disturbed("flock", fcntl.flock))

    def _disturbed(self, name: str, real: Callable[..., Any], *, of_package: bool = False) -> Callable[..., Any]:
        def disturbed(*arguments: Any, **options: Any) -> Any:
            if of_package and not _called_by_package():
                return real(*arguments, **options)
            fault = self.fault
            with self._lock:
                self.kinds.append(name)
                counts = fault is not None and fault.kind in ("", name)
                count = self.kinds.count(name) if fault is not None and fault.kind else len(self.kinds)
                hit = fault is not None and counts and count == fault.at
                if hit:
                    self._kind = name
                    self._made_up_for = name == "replace" and Path(arguments[1]).name == TAKEN
                hit = hit or (fault is not None and fault.sticky and self._kind == name)
            if not hit or fault is None:
                return real(*arguments, **options)
            if isinstance(fault.code, str):
                return _shortened(name, real, fault.code, *arguments)
            if name == "close":
                real(*arguments)  # the system lets go of it, whatever it says
            raise OSError(fault.code, os.strerror(fault.code))

        return disturbed

    def write_down(self) -> None:
        """All calls by their kinds, and which kind was failed; what cannot be moved away is removed where it is."""
        kind = f"{self._kind} on the way out" if self._made_up_for else self._kind
        self.note.write_text(json.dumps({"kinds": self.kinds, "kind": kind}))


class _Mapping:
    """The module `mmap`, but for the one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.mmap = lambda fd, *rest, **options: (function if fd >= 0 else mmap.mmap)(fd, *rest, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(mmap, name)


class _Locking:
    """The module `fcntl`, but for the one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.flock = function

    def __getattr__(self, name: str) -> Any:
        return getattr(fcntl, name)


def _called_by_package() -> bool:
    """Whether the caller, behind the standard library, is streammerge."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(PACKAGE) or name in COUNTED:
            return True
        if "site-packages" in name or f"{os.sep}tests{os.sep}" in name or "importlib" in name:
            return False
        frame = frame.f_back
    return False


def _shortened(name: str, real: Callable[..., Any], how: str, *arguments: Any) -> int:
    """A read or write of fewer bytes than were asked for."""
    if name not in CUT:
        return real(*arguments)
    data = memoryview(arguments[1][0] if name == "preadv" else arguments[1])
    size = {"half": len(data) // 2 // io.ALIGNMENT * io.ALIGNMENT, "odd": max(len(data) - 37, 0), "nothing": 0}[how]
    if size == 0:
        return 0
    done = size
    if fcntl.fcntl(arguments[0], fcntl.F_GETFL) & os.O_DIRECT:
        done = size // io.ALIGNMENT * io.ALIGNMENT  # what a device has really done: it knows no less than a sector
        if done == 0:
            return size if name == "pwrite" else 0
    part = [data[:done]] if name == "preadv" else data[:done]
    count = real(arguments[0], part, *arguments[2:])
    return min(count, size) if done == size or name == "preadv" else size


class Errors(Campaign):
    """All faults of one layout, from an empty output and from one that another run has left."""

    def __init__(self, name: str, root: Path) -> None:
        super().__init__(name, root)
        self.said: set[str] = set()
        self.codes: dict[int, int] = {}
        self.layout.prepare()
        shutil.rmtree(root / "left", ignore_errors=True)
        assert self.run(self.operations * 2 // 3) == KILLED
        self.layout.out.rename(root / "left")
        self.calls = {resumed: self.undisturbed(resumed=resumed) for resumed in (False, True)}

    def start(self, *, resumed: bool) -> None:
        """The output as it is before the run."""
        if resumed:
            shutil.rmtree(self.layout.out, ignore_errors=True)
            shutil.copytree(self.layout.root / "left", self.layout.out)
        else:
            self.layout.prepare()

    def disturbed(self, fault: Fault | None, *, resumed: bool) -> tuple[Outcome, str | None, list[str]]:
        """A run with its fault: what the command said, which kind of call it was, the kinds of all calls."""
        note = self.layout.root / "note"
        note.unlink(missing_ok=True)
        self.start(resumed=resumed)

        def before() -> None:
            ORDER.clear()
            disturber = Disturber(fault, note)
            real_exit = os._exit

            def ended(code: int) -> None:
                disturber.fault = None
                disturber.write_down()
                real_exit(verdict(code))

            os._exit = ended

        outcome = command(*self.layout.command(self.layout.out), before=before)
        found = json.loads(note.read_text()) if note.exists() else {"kinds": [], "kind": None}
        return outcome, found["kind"], found["kinds"]

    def undisturbed(self, *, resumed: bool) -> list[str]:
        """The calls of a run that nobody disturbs, by their kinds."""
        outcome, _, kinds = self.disturbed(None, resumed=resumed)
        assert outcome.code == 0, outcome.err
        return kinds

    def failing(self, fault: Fault, *, resumed: bool) -> bool:
        """One fault, and the run that follows it; whether there was one."""
        outcome, kind, _ = self.disturbed(fault, resumed=resumed)
        case = f"{self.layout.root.name}{', resumed' if resumed else ''}, {kind} {fault}"
        self.codes[outcome.code] = self.codes.get(outcome.code, 0) + 1
        self.wrong += [f"{case}: {problem}" for problem in self.problems(outcome, kind, fault)]
        if self.run() != 0:
            self.wrong.append(f"{case}: the next run failed")
        found = bytes_of(self.layout.out)
        if found != self.healthy:
            self.wrong.append(f"{case}: the result differs in {differing(found, self.healthy)}")
        if snapshot(*roots_of(self.layout)) != self._inputs:
            self.wrong.append(f"{case}: the inputs were changed")
        return kind is not None

    def problems(self, outcome: Outcome, kind: str | None, fault: Fault) -> Iterator[str]:
        """What is wrong with the end of a run."""
        there = bytes_of(self.layout.out)
        if outcome.code == 0:
            if kind in MUST_BE_TOLD and isinstance(fault.code, int):
                yield "the run went on as if nothing had happened"
            if differing(there, self.healthy):
                yield f"exit code 0, and the result differs in {differing(there, self.healthy)}"
            return
        if outcome.code not in EXIT_CODES:
            yield f"exit code {outcome.code}: {outcome.err[-1500:]}"
            return
        said = MESSAGE.search(outcome.err)
        if "Traceback" in outcome.err or said is None or not said["path"].startswith(str(self.layout.root)):
            yield f"no message with the path: {outcome.err[-1500:]}"
        elif isinstance(fault.code, int) and os.strerror(fault.code) not in said[0]:
            yield f"the message does not give the reason: {said[0]}"
        else:
            self.said.add(said[0].partition("`")[0])
        taken = wrongly_loadable(there, self.healthy, self.old)
        if taken:
            yield f"a loader takes {taken}"

    def faults(self, step: int, errnos: int) -> int:
        """Every `step`-th call with so many of ERRNOS, once and sticky; reads and writes short; how many that were."""
        tried = 0
        for resumed in (False, True):
            for at in range(1, len(self.calls[resumed]) + 1, step):
                turn = at // step
                codes: list[int | str] = [ERRNOS[(turn * errnos + k) % len(ERRNOS)] for k in range(errnos)]
                faults = [Fault(at, code, sticky) for code in codes for sticky in (False, True)]
                if step == 1 or turn % 3 == 0:
                    faults.append(Fault(at, SHORT[turn % len(SHORT)], sticky=turn % 2 == 0))
                for fault in faults:
                    tried += self.failing(fault, resumed=resumed)
            # Threads take turns as they like: the n-th call is not always of the same kind, and here it is.
            for kind in sorted(CUT):
                for how in SHORT:
                    tried += self.failing(Fault(1, how, sticky=True, kind=kind), resumed=resumed)
        return tried


def main() -> None:
    """Run the campaign on the layouts that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    parser.add_argument(
        "--step", type=int, default=1, help=f"every n-th call only, every {COARSER} n-th after the first"
    )
    parser.add_argument("--errnos", type=int, default=1, help="so many errors for each call")
    arguments = parser.parse_args()
    prepared()
    began = time.monotonic()
    kinds = [*(errno.errorcode[code] for code in ERRNOS), "short read", "short write"]
    figures: dict[str, Any] = {"campaign": "errnos", "points": 0, "calls": {}, "codes": {}, "kinds": kinds, "wrong": []}
    for name in arguments.only:
        (arguments.folder / name).mkdir(parents=True)
        campaign = Errors(name, arguments.folder / name)
        warm_up(campaign)
        step = arguments.step * (1 if name == arguments.only[0] else COARSER)
        figures["points"] += campaign.faults(step, arguments.errnos)
        figures["calls"][name] = [len(campaign.calls[resumed]) for resumed in (False, True)]
        for code, count in campaign.codes.items():
            figures["codes"][code] = figures["codes"].get(code, 0) + count
        figures["wrong"] += campaign.wrong
    sys.stdout.write(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}) + "\n")


if __name__ == "__main__":
    main()
