"""Every malicious input of the corpus, given to the command in a fork of this process.

    python -m tests.campaigns.hostile FOLDER [--step N] [--only TEXT]

Prints one JSON object: how many inputs there were, how many messages they were refused with, what was wrong, the
slowest in seconds of the processor and the largest in megabytes beyond the imported libraries.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import streammerge
from tests.hostile.case import healthy_place
from tests.hostile.corpus import CASES
from tests.hostile.trial import Ended, wrong_with


def tried(folder: Path, *, step: int = 1, only: str = "") -> dict[str, Any]:
    """The verdict on every n-th case."""
    began = time.monotonic()
    healthy = folder / "healthy"
    healthy.mkdir(parents=True)
    place = healthy_place(healthy)
    streammerge.plan(place.base, place.adapter)  # what a command loads on its way is not what a case takes
    import_module("streammerge.cli.commands")
    wrong: list[str] = []
    ends: dict[str, Ended] = {}
    chosen = [case for case in CASES if only in case.name][::step]
    for number, case in enumerate(chosen):
        root = folder / f"case-{number}"
        root.mkdir()
        found, ends[case.name] = wrong_with(case, healthy, root)
        wrong += found
    messages = {re.sub(r"/\S*/case-\d+/", "", end.text) for end in ends.values() if end.code}
    slowest = max(ends, key=lambda name: ends[name].busy)
    largest = max(ends, key=lambda name: ends[name].memory)
    return {
        "campaign": "hostile",
        "points": len(chosen),
        "wrong": wrong,
        "seconds": round(time.monotonic() - began, 1),
        "refused": sum(end.code != 0 for end in ends.values()),
        "messages": len(messages),
        "slowest": slowest,
        "slowest_seconds": round(ends[slowest].busy, 2),
        "slowest_on_the_clock": round(max(end.seconds for end in ends.values()), 2),
        "largest": largest,
        "largest_megabytes": round(ends[largest].memory / 1e6, 1),
    }


def main() -> None:
    """Run the campaign that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, default=1, help="every n-th input only")
    parser.add_argument("--only", default="", help="inputs with this in their name")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(tried(arguments.folder, step=arguments.step, only=arguments.only)) + "\n")


if __name__ == "__main__":
    main()
