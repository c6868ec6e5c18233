"""Fuzz the four parsers of what strangers write: header, index, adapter config, adapter keys.

    python -m tests.campaigns.fuzz FOLDER [--cases N] [--seed S] [--parser P] [--part N] [--size BYTES ...] [--step N]

Each parser has its share of the cases, in a process of its own, two at a time; more than `--part` cases are tried in
parts with seeds of their own, and parts that an earlier call finished in the same folder are not repeated. Then texts
of `--size` bytes that are made to take memory are read. Prints one JSON object; without atheris it says so and exits 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzz.bombs import swept

SHARES = {"header": 0.25, "index": 0.5, "config": 0.22, "keys": 0.03}
"""An index takes half the time of a header, keys take four times as long: a case has several, and each is looked up."""
AT_ONCE = 2


def part(parser: str, folder: Path, cases: int, seed: int) -> dict[str, Any]:
    """What a worker found in so many cases; a part that is there already is only read."""
    place = folder / f"{parser}-{seed}-{cases}"
    result = place / f"{parser}.json"
    if not result.exists():
        place.mkdir(parents=True, exist_ok=True)
        shared = folder / "corpus"
        shared.mkdir(exist_ok=True)
        (place / "corpus").exists() or (place / "corpus").symlink_to(shared.resolve())
        command = [sys.executable, "-m", "tests.fuzz.worker", parser, str(place), "--cases", str(cases)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--seed", str(seed)],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
        if not result.exists():
            said = " | ".join(done.stderr.strip().splitlines()[-3:])
            return {"cases": 0, "wrong": [f"{parser}, seed {seed}: the process ended with {done.returncode}: {said}"]}
    return dict(json.loads(result.read_text()))


def parts(parser: str, cases: int, seed: int, most: int) -> list[tuple[str, int, int]]:
    """The parts of one parser, as (parser, cases, seed)."""
    count = -(-cases // most)
    return [(parser, cases // count + (number < cases % count), seed + number) for number in range(count)]


def summary(parser: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """One parser's parts together."""
    return {
        "parser": parser,
        "cases": sum(one["cases"] for one in found),
        "accepted": sum(one.get("accepted", 0) for one in found),
        "cases_per_second": round(sum(one.get("cases_per_second", 0) for one in found) / len(found)),
        "processor_us_per_case": round(max(one.get("processor_us_per_case", 0) for one in found), 1),
        "slowest_case_s": max(one.get("slowest_case_s", 0) for one in found),
        "memory_growth_mib": max(one.get("memory_growth_mib", 0) for one in found),
    }


def main() -> None:
    """Run the campaign that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=1_000_000, help="of all parsers together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parser", choices=SHARES, help="this one only, with all of the cases")
    parser.add_argument("--part", type=int, default=2_000_000, help="cases that one process tries at most")
    parser.add_argument("--size", type=int, action="append", help="bytes of the texts that are made to take memory")
    parser.add_argument("--step", type=int, default=1, help="every n-th of those texts only")
    arguments = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.stderr.write("the fuzzer takes atheris (pip install atheris==3.0.0), which is not installed\n")
        raise SystemExit(2)
    began = time.perf_counter()
    shares = {arguments.parser: 1.0} if arguments.parser else SHARES
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: max(1, round(arguments.cases * share)) for name, share in shares.items()}
    todo = [one for name, cases in wanted.items() for one in parts(name, cases, arguments.seed, arguments.part)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = list(pool.map(lambda one: part(one[0], arguments.folder, one[1], one[2]), todo))
    results = [
        summary(name, [done for one, done in zip(todo, found, strict=True) if one[0] == name]) for name in wanted
    ]
    fuzzed = time.perf_counter() - began
    texts = swept(arguments.folder, arguments.size or [6_000_000], arguments.step)
    cases = sum(one["cases"] for one in results)
    report = {
        "campaign": "fuzz",
        "points": cases,
        "cases": cases,
        "cases_per_second": round(cases / fuzzed),
        "wrong": [*(line for one in found for line in one["wrong"]), *texts.pop("wrong")],
        "slowest_case_s": max(one["slowest_case_s"] for one in results),
        "memory_growth_mib": max(one["memory_growth_mib"] for one in results),
        "parsers": results,
        "large_texts": texts,
        "seconds": round(time.perf_counter() - began, 1),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
