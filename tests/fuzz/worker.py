"""One parser fuzzed in one process: libFuzzer, by way of atheris, drives a target and a mutator so many cases far.

    python -m tests.fuzz.worker PARSER FOLDER --cases N [--seed S]

Cases that grow coverage are kept in FOLDER/corpus/PARSER, those that go wrong in FOLDER/found/PARSER, and a worker goes
on after them. What came of it is written to FOLDER/PARSER.json at the end; a hang ends the process before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random

import atheris

PLAIN = {
    *(f"streammerge.core.{name}" for name in ("errors", "io", "lines", "tensors", "text")),
    *(
        f"streammerge.names.{name}"
        for name in ("architectures", "conversions", "layouts", "operators", "pieces", "sizes")
    ),
}
"""Modules whose branches say nothing of a parser."""
# Branches only: `instrument_imports` also reports every comparison, which takes longer than the parsers do, and the
# words of the mutations stand in for what it finds.
with atheris.import_hook.HookManager({"streammerge"}, PLAIN, enable_loader_override=True, trace_dataflow=False):
    from tests.fuzz import targets
    from tests.fuzz.mutate import mutated
LONGEST = {"header": 4096, "index": 4096, "config": 4096, "keys": 512}
"""Bytes of a case."""
SECONDS, HANGING = 1.0, 20
"""What a case may take of the processor's time, and after how long without an end the process is stopped."""
BOUND = 64 * 2**20 + 16 * max(LONGEST.values())
"""Bytes that the process may grow by, whatever the cases."""
THOROUGH = 32
"""Every so many cases, what is slow to look at is looked at too."""
MOST_FOUND = 40
KEPT = Path(__file__).with_name("corpus")


class Worker:
    """Counts, times and judges cases."""

    def __init__(self, parser: str, folder: Path, cases: int) -> None:
        self.parser, self.folder, self.cases = parser, folder, cases
        self.target: Callable[..., bool] = targets.TARGETS[parser]
        self.count = self.accepted = self.grown = 0
        self.slowest = self.start = self.processor = 0.0
        self.before = 0
        self.wrong: dict[str, str] = {}

    def case(self, data: bytes) -> None:
        """Try one case; at the last one, write what was found and end the process."""
        if self.count == 0:
            self.start, self.processor, self.before = time.perf_counter(), time.process_time(), peak()
        self.count += 1
        began = time.perf_counter()
        try:
            self.accepted += self.target(data, thorough=self.count % THOROUGH == 0)
        except Exception as error:
            self.note(error, data)
        took = time.perf_counter() - began
        if took > self.slowest:
            self.look_at_time(data, took)
        if self.count % 1024 == 0 or self.count == self.cases:
            self.grown = peak() - self.before
            if self.count == self.cases:
                self.finish()

    def look_at_time(self, data: bytes, took: float) -> None:
        """Time a slow case again by the processor's clock: a busy machine is not its fault."""
        if took > SECONDS / 4:
            began = time.thread_time()
            try:
                self.target(data)
            except Exception as error:
                self.note(error, data)
            took = time.thread_time() - began
            if took > SECONDS:
                self.keep(f"{took:.2f} s", data)
        self.slowest = max(self.slowest, took)

    def note(self, error: BaseException, data: bytes) -> None:
        """Remember a fault by where it comes from."""
        where = traceback.extract_tb(error.__traceback__)[-1]
        self.keep(f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}", data)

    def keep(self, what: str, data: bytes) -> None:
        place = what.partition(": ")[0]
        if place not in self.wrong and len(self.wrong) < MOST_FOUND:
            name = sha256(data).hexdigest()[:16]
            found = self.folder / "found" / self.parser
            found.mkdir(parents=True, exist_ok=True)
            (found / name).write_bytes(data)
            self.wrong[place] = f"{self.parser} {name}: {what}"

    def finish(self) -> None:
        """Write what was found and end the process, without libFuzzer's own end."""
        seconds = time.perf_counter() - self.start
        wrong = list(self.wrong.values())
        if self.grown > BOUND:
            wrong.append(f"{self.parser}: the process grew by {self.grown / 2**20:.0f} MiB")
        found = {
            "cases": self.count,
            "accepted": self.accepted,
            "wrong": wrong,
            "seconds": round(seconds, 1),
            "cases_per_second": round(self.count / seconds),
            "processor_us_per_case": round((time.process_time() - self.processor) / self.count * 1e6, 1),
            "slowest_case_s": round(self.slowest, 4),
            "memory_growth_mib": round(self.grown / 2**20, 1),
        }
        (self.folder / f"{self.parser}.json").write_text(json.dumps(found))
        sys.stderr.flush()
        os._exit(0)


def peak() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Fuzz the parser that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parser", choices=targets.TARGETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    corpus = arguments.folder / "corpus" / arguments.parser
    corpus.mkdir(parents=True, exist_ok=True)
    worker = Worker(arguments.parser, arguments.folder, arguments.cases)
    rng = Random(arguments.seed)

    def mutator(data: bytes, longest: int, seed: int) -> bytes:
        return mutated(arguments.parser, data, rng, lambda part: atheris.Mutate(part, longest))[:longest]

    longest, kept = LONGEST[arguments.parser], KEPT / arguments.parser
    limits = [f"-seed={arguments.seed}", f"-max_len={longest}", f"-timeout={HANGING}", "-rss_limit_mb=4096"]
    habits = [f"-artifact_prefix={arguments.folder}/", "-len_control=0", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, *habits, str(corpus), str(kept)], worker.case, custom_mutator=mutator)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
