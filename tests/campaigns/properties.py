"""Random merges against an oracle, and random sequences of runs, kills and damage.

    python -m tests.campaigns.properties FOLDER [--pairs N] [--runs N] [--steps N] [--seed S]

`--pairs` random bases and adapters are merged and every byte compared with the formula in float64, computed by the
test; then `--runs` sequences of at most `--steps` steps are played on one output. Prints one JSON object. A failure
ends the part it happens in, after hypothesis has made it small.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.campaigns.kills import prepared
from tests.properties.machine import Machine, prepared_world
from tests.properties.test_merges import COUNTED, checked


def attempt(what: str, work: Callable[[], None], wrong: list[str]) -> None:
    """Do `work`; what it fails with is wrong."""
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        wrong.append(f"{what}: {type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:600]}")


def play(runs: int, steps: int, seed: int) -> None:
    """So many sequences of at most so many steps."""
    chosen = settings(
        max_examples=runs,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=chosen)


def main() -> None:
    """Run the campaign that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began, wrong = time.perf_counter(), []
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.pairs:
        attempt("merges", checked(arguments.folder, arguments.pairs, arguments.seed), wrong)
    merged = time.perf_counter()
    tally: dict[str, int] = {}
    if arguments.runs:
        prepared()
        tally = prepared_world(arguments.folder / "world")
        gc.collect()
        gc.freeze()
        attempt("sequences", lambda: play(arguments.runs, arguments.steps, arguments.seed), wrong)
    report = {
        "campaign": "properties",
        "points": COUNTED["merges"] + sum(tally.values()),
        "wrong": wrong,
        "pairs": COUNTED["merges"],
        "sequences": arguments.runs,
        "steps": tally,
        "seconds_of_merges": round(merged - began, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
