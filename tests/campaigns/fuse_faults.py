"""File systems that fail the n-th read, write, sync, close or rename, below the base and below the output.

    python -m tests.campaigns.fuse_faults FOLDER [--points N] [--seed S]

Both are directories that a FUSE server hands through; base and adapters lie on one mount, the output on another. For
every kind of fault, at places spread over all where it can strike: the exit code is the documented one, the message
names path and operation, nothing is there that a loader would take, and when the fault is gone the same command
finishes with the same bytes.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.campaigns.kills import bytes_of
from tests.campaigns.mounted import run
from tests.campaigns.passthrough import Control, Fault, served
from tests.campaigns.watching import READS, WRITES, command, differing, problems_of, snapshot
from tests.refusals.making import STAGING, Outcome
from tests.sinks.subjects import make_subject

OUTPUT: dict[str, tuple[int, ...]] = {
    "create": (errno.ENOSPC, errno.EACCES),
    "write": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO,),
    "flush": (errno.EDQUOT,),
    "rename": (errno.EROFS,),
    "fsyncdir": (errno.EIO,),
    "fallocate": (errno.ENOSPC,),
    "mkdir": (errno.EDQUOT,),
    "unlink": (errno.EIO,),
    "open": (errno.EIO,),
}
BASE: dict[str, tuple[int, ...]] = {
    "open": (errno.EACCES, errno.EMFILE),
    "read": (errno.EIO, errno.ESTALE),
    "opendir": (errno.EIO,),
}
"""What each operation fails with, on the output and on the inputs."""
ALSO = {"flush": (0,), "unlink": (0,), "open": (0, READS)}
"""Other exit codes: what has to last was synced before it was closed, what was open when it was removed is removed by
the server later, a result that is verified is read, and so is what is published, by the checker of the order alone."""
OTHERS = (
    (Fault("fallocate", errno.EOPNOTSUPP, sticky=True), (0,), False),
    (Fault("fsyncdir", errno.EINVAL, sticky=True), (0,), False),
    (Fault("write", action="half"), (0, WRITES), False),
    (Fault("read", action="half"), (0, READS), True),
    (Fault("read", action="shrink"), (READS,), True),
    (Fault("open", errno.ESTALE), (0,), True),  # the kernel asks once more
    (Fault("open", errno.ESTALE, sticky=True), (READS,), True),
)
"""What file systems may do, and a run copes with or not; whether it is done to the inputs."""


@dataclass(frozen=True, slots=True)
class Case:
    """A fault on the output or on the inputs, and the exit codes that it may lead to."""

    fault: Fault
    codes: tuple[int, ...]
    on_inputs: bool = False

    @property
    def kind(self) -> str:
        """What the fault is, wherever it strikes."""
        what = errno.errorcode[self.fault.errno] if self.fault.errno else self.fault.action
        return f"{what} on {self.fault.operation} of {'an input' if self.on_inputs else 'the output'} (FUSE)"


def cases() -> Iterator[Case]:
    """Every kind of case, striking nowhere yet."""
    for on_inputs, table, code in ((False, OUTPUT, WRITES), (True, BASE, READS)):
        for operation, numbers in table.items():
            for number in numbers:
                codes = (code, *ALSO.get(operation, ())) if not on_inputs else (code,)
                # A write that the kernel hands on in two parts comes short if the second fails, and is gone on with.
                once = (*codes, 0) if operation == "write" else codes
                yield Case(Fault(operation, number), once, on_inputs)
                yield Case(Fault(operation, number, sticky=True), codes, on_inputs)
    yield from (Case(*other) for other in OTHERS)


def as_torch_saves_it(path: Path) -> None:
    """The `.bin` file in place of an adapter's weights, which is read by another library."""
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


class Faulty:
    """One merge between two file systems that fail."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "written" / "out"
        self.inputs, self.base = folder / "inputs", folder / "read" / "base"
        _, adapters = make_subject(self.inputs, "BF16")
        as_torch_saves_it(adapters[-1] / "adapter_model.safetensors")
        self.kept = folder / "kept"
        shutil.copytree(self.inputs, self.kept)
        (folder / "output").mkdir()
        self.adapters = [folder / "read" / adapter.name for adapter in adapters]
        self.wrong: list[str] = []
        self.ended: Counter[int] = Counter()
        self.healthy: dict[str, bytes] = {}

    def run(self, *options: str) -> Outcome:
        """The command."""
        return command("run", self.base, *self.adapters, "-o", self.out, "--workers", 2, *options)

    def found(self) -> dict[str, bytes]:
        """What is in the output, seen from behind."""
        return bytes_of(self.folder / "output" / "out")

    def prepare(self) -> None:
        """Nothing is in the output."""
        shutil.rmtree(self.folder / "output" / "out", ignore_errors=True)

    def calls(self, reads: Control, writes: Control) -> tuple[dict[str, int], dict[str, int]]:
        """How often a run that nobody disturbs calls the operations of the inputs, and of the output."""
        for control in (reads, writes):
            control.set(Fault())
        done = self.run()
        assert done.code == 0, done.err
        self.healthy = self.found()
        return reads.counts(), writes.counts()

    def strike(self, case: Case, control: Control, *options: str) -> None:
        """One case, and the run after it."""
        self.prepare()
        before = snapshot(self.inputs)
        control.set(case.fault)
        done = self.run(*options)
        met = control.counts()[case.fault.operation] >= case.fault.at
        control.set(Fault())
        self.ended[done.code] += 1
        lasting = " and ever after" if case.fault.sticky else ""
        label = f"{case.kind}, at {case.fault.at}{lasting} {' '.join(options)}"
        if met:
            place = self.folder / ("read" if case.on_inputs else "written")
            found = problems_of(done, case.codes, place, self.found(), self.healthy)
            self.wrong += [f"{label}: {problem}" for problem in found]
        if case.fault.action == "shrink":
            shutil.copytree(self.kept, self.inputs, dirs_exist_ok=True)
        elif snapshot(self.inputs) != before:
            self.wrong.append(f"{label}: the inputs were changed")
        again = self.run(*options)
        if again.code != 0 or (names := differing(self.found(), self.healthy)):
            what = f"ended with {again.code}: {again.err}" if again.code else f"differs in {names}"
            self.wrong.append(f"{label}: the next run {what}")
        if (self.folder / "output" / "out" / STAGING).exists():
            self.wrong.append(f"{label}: the staging area was left behind")


def strikes(count: int, places: int, generator: random.Random) -> list[int]:
    """So many of the places 1 to `places`, evenly spread; all of them if there are no more."""
    if count >= places:
        return list(range(1, places + 1))
    shift = generator.random()
    return [1 + int((n + shift) * places / count) for n in range(count)]


def campaign(folder: Path, points: int, seed: int) -> dict[str, Any]:
    """Every kind of case, or as many as there are points, and what was wrong."""
    generator = random.Random(seed)
    listed = list(cases())
    generator.shuffle(listed)
    faulty, kinds, tried = Faulty(folder), set(), 0
    with (
        served(faulty.inputs, folder / "read", direct=True) as reads,
        served(folder / "output", folder / "written") as writes,
    ):
        of_inputs, of_output = faulty.calls(reads, writes)
        for number, case in enumerate(listed):
            control, calls = (reads, of_inputs) if case.on_inputs else (writes, of_output)
            share = points // len(listed) + (number < points % len(listed))
            for at in strikes(share, calls[case.fault.operation], generator):
                options = ("--io", "buffered") if generator.random() < 0.5 else ()
                faulty.strike(replace(case, fault=replace(case.fault, at=at)), control, *options)
                kinds.add(case.kind)
                tried += 1
    ended = {f"exit code {code}": count for code, count in sorted(faulty.ended.items())}
    return {"points": tried, "kinds": sorted(kinds), "ended": ended, "wrong": faulty.wrong}


if __name__ == "__main__":
    run("fuse_faults", campaign, points=40)
