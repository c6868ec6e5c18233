"""Send a signal to the real command at a random moment, see how it ends and how soon, and let the same command finish.

    python -m tests.campaigns.signals FOLDER --times N [--layers N] [--seed S]

Half of the moments are before a run begins to write, most of which is loading torch; half are after. Every other run
that was ended is gone on with by one that is ended too, mostly while it reads again what is there. Prints one JSON
object: how many signals were sent in which phase, how long the command took to end, and what was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import xxhash

import streammerge
from streammerge.core import io
from tests.campaigns.kills import child
from tests.campaigns.listening import listen
from tests.refusals.making import BASE_CONFIG, INDEX, MARKER, STAGING, Stored, factors, make_adapter, make_base, normal

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
LIMIT = 2.0
"""Seconds in which a command has to end."""
HIDDEN, INNER, RANK = 2048, 4096, 16
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
VARIANTS: tuple[tuple[str, ...], ...] = ((), ("--io", "buffered"), ("--sha256",), ("--no-verify", "-j", "1"))
"""Options of runs: the last one leaves more than half of its time to the writing."""


def make_inputs(root: Path, layers: int) -> tuple[Path, Path]:
    """A base of so many times 50 MB in three shards, and an adapter on all of it."""
    tensors: dict[str, Stored] = {"model.norm.weight": normal("norm", HIDDEN, dtype="BF16")}
    pairs: dict[str, Stored] = {}
    for layer in range(layers):
        for name, (out, inputs) in MODULES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(f"{layer} {name}", out, inputs, dtype="BF16")
            pairs |= factors(f"model.layers.{layer}.{name}", out, inputs, rank=RANK)
    changes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers}
    config = {"r": RANK, "target_modules": [name.rpartition(".")[2] for name in MODULES]}
    return make_base(root / "base", tensors, shards=3, changes=changes), make_adapter(root / "adapter", pairs, **config)


def digests_of(root: Path) -> dict[str, str]:
    """A digest of every file below a directory, none where it is not there."""
    return {name: _digest(root / name) for name in io.list_tree(root)} if root.exists() else {}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


@dataclass(slots=True)
class Campaign:
    """The inputs, what they come to, and what was seen."""

    root: Path
    base: Path
    adapter: Path
    random: random.Random
    healthy: dict[bool, dict[str, str]] = field(default_factory=dict)
    starts: float = math.inf
    writes: float = math.inf
    took: list[float] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """Where all runs write."""
        return self.root / "out"

    def begin(self, *options: str) -> subprocess.Popen[str]:
        """The command, begun."""
        command = [sys.executable, "-m", "streammerge", "run", self.base, self.adapter, "-o", self.out, *options]
        return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def measure(self) -> None:
        """What the outputs come to, how long it takes until a run writes, and how long from there to its end."""
        for options in ((), ("--sha256",)):
            shutil.rmtree(self.out, ignore_errors=True)
            began = time.monotonic()
            with self.begin(*options) as process:
                while not list(self.out.glob(f"{STAGING}/*/*.part")) and process.poll() is None:
                    time.sleep(0.002)
                wrote = time.monotonic()
                _, err = process.communicate()
            assert process.returncode == 0, err
            self.starts, self.writes = min(self.starts, wrote - began), min(self.writes, time.monotonic() - wrote)
            self.healthy["--sha256" in options] = digests_of(self.out)

    def finish(self, options: tuple[str, ...], case: str) -> None:
        """Let the same command finish, in a fork of this process, and see that it gives the same bytes."""
        given = {"io": "buffered"} if "buffered" in options else {"sha256": True} if "--sha256" in options else {}
        if child(lambda: streammerge.merge(self.base, self.adapter, self.out, verify=False, **given) and None) != 0:
            self.wrong.append(f"{case}: the run that follows failed")
        if digests_of(self.out) != self.healthy["--sha256" in options]:
            self.wrong.append(f"{case}: the run that follows gives other bytes")

    def point(self) -> None:
        """Signals into one run, or into two, and a run that finishes."""
        shutil.rmtree(self.out, ignore_errors=True)
        options = self.random.choice(VARIANTS)
        case = self.interrupt(options, resumed=False)
        if self.random.random() < 0.5:
            case = f"{case}, then {self.interrupt(options, resumed=True)}"
        self.finish(options, case)

    def interrupt(self, options: tuple[str, ...], *, resumed: bool) -> str:
        """A run that gets a signal, or SIGINT twice; what it was."""
        signum, twice = self.random.choice(list(CODES)), False
        if signum == signal.SIGINT:
            twice = self.random.random() < 0.3
        with self.begin(*options) as process:
            if self.random.random() < 0.5:
                moment = self.random.uniform(0, self.starts)
                time.sleep(moment)
            else:
                while not (self.out / STAGING).is_dir() and process.poll() is None:
                    time.sleep(0.002)
                moment = self.random.uniform(0, self.writes)
                time.sleep(moment)
            if process.poll() is not None:
                self.phases["after its end"] += 1
                self.judge_end(f"{signum.name} after the end", process, 0, 0.0)
                return "nothing"
            phase, ours = self.phase(resumed=resumed), handles(process.pid)
            case = f"{signum.name}{' twice' if twice else ''} {moment:.3f} s, {phase}, {' '.join(options)}"
            self.phases[phase if ours else "before the command"] += 1
            began = time.monotonic()
            process.send_signal(signum)
            if twice:
                time.sleep(self.random.uniform(0, 0.1))
                began = time.monotonic()
                process.send_signal(signum)
            self.judge(case, process, {CODES[signum], *([-signum] if twice else [])} if ours else None, began)
        return case

    def phase(self, *, resumed: bool) -> str:
        """What a run is at, from what it has written."""
        if (self.out / MARKER).exists():
            return "check"
        if list(self.out.glob("model-*")):
            return "publication"
        if not (self.out / STAGING).is_dir():
            return "start"
        return "going on" if resumed else "writing"

    def judge(self, case: str, process: subprocess.Popen[str], codes: set[int] | None, began: float) -> None:
        """Wait for the end, and see that it came in time, with one of the codes, its one line, and nothing loadable.
        Without codes it was Python that was starting, and what that says is not ours."""
        try:
            _, err = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            _, err = process.communicate()
        took = time.monotonic() - began
        if process.returncode == 0:  # all but the last instruction was done
            self.judge_end(case, process, 0, took)
            return
        self.took.append(took)
        if took > LIMIT:
            self.wrong.append(f"{case}: ended after {took:.2f} s")
        if codes is None:
            self.judge_output(case)
            return
        if process.returncode not in codes:
            self.wrong.append(f"{case}: ended with {process.returncode}: {err[-300:]}")
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        if process.returncode > 0:
            number = process.returncode - 128
            if said != [
                f"error: stopped by {signal.Signals(number).name}; nothing is lost: run the same command again"
            ]:
                self.wrong.append(f"{case}: said {err[-300:]}")
            if "Traceback" in err:
                self.wrong.append(f"{case}: a traceback: {err[-300:]}")
        self.judge_output(case)

    def judge_end(self, case: str, process: subprocess.Popen[str], code: int, took: float) -> None:
        """A run that a signal did not reach any more has to be a run like any other."""
        if process.returncode != code or took > LIMIT:
            self.wrong.append(f"{case}: ended by itself with {process.returncode} after {took:.2f} s")

    def judge_output(self, case: str) -> None:
        """A loader takes the finished result or nothing."""
        there = {name for name in (BASE_CONFIG, INDEX, MARKER) if (self.out / name).exists()}
        whole = any(
            {name: data for name, data in digests_of(self.out).items() if not name.startswith(f"{STAGING}/")} == healthy
            for healthy in self.healthy.values()
        )
        if there and not whole:
            self.wrong.append(f"{case}: left {sorted(there)}")


def handles(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM: before, it is Python that is starting, and not the command."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def main() -> None:
    """Run as many points as the command line says."""
    listen()
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--layers", type=int, default=1, help="of the base, 50 MB each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    began = time.monotonic()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    inputs = make_inputs(arguments.folder, arguments.layers)
    before = [digests_of(path) for path in inputs]
    campaign = Campaign(arguments.folder, *inputs, random.Random(arguments.seed))
    campaign.measure()
    while len(campaign.took) < arguments.times:
        campaign.point()
    if [digests_of(path) for path in inputs] != before:
        campaign.wrong.append("an input was changed")
    took = sorted(campaign.took)
    found = {
        "campaign": "signals",
        "points": len(took),
        "phases": campaign.phases,
        "seconds_of_a_run": [round(campaign.starts, 2), round(campaign.writes, 2)],
        "p50": round(statistics.median(took), 3),
        "p99": round(took[min(len(took) - 1, int(len(took) * 0.99))], 3),
        "max": round(took[-1], 3),
        "wrong": campaign.wrong,
        "seconds": round(time.monotonic() - began, 1),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
