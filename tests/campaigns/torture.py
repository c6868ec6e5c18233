"""All campaigns, as many at a time as there are cores, and what came of them.

    scripts/torture [--long] [--only MODULE ...] [--results DIR]

A campaign is a module beside this one that prints one JSON object. Its rows in `rows.py` say with which arguments it
runs in either form, and how much it must have tried: one that tried less has not done its work, whatever it found.
Prints a line for each row; exit code 1 if anything went wrong anywhere. `--results` also writes the table of RESULTS.md
in that directory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.rows import ROWS, Row

ROOT = Path(__file__).parents[2]
ABOUT = {"campaign", "points", "wrong", "seconds", "kinds", "skipped"}
"""What every campaign says; the rest are figures of its own."""


@dataclass(frozen=True)
class Found:
    """What came of a row: what the campaign said, and what is wrong."""

    row: Row
    seconds: float
    said: dict[str, Any]
    wrong: list[str]

    @property
    def verdict(self) -> str:
        """In a few words."""
        if "skipped" in self.said:
            return f"skipped: {self.said['skipped']}"
        return f"{len(self.wrong)} WRONG" if self.wrong else "all right"

    @property
    def figures(self) -> str:
        """The campaign's own figures, those that are a number or a word."""
        own = {name: value for name, value in self.said.items() if name not in ABOUT}
        return ", ".join(f"{name} {_short(v)}" for name, v in own.items() if not isinstance(v, dict | list))


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def run_row(row: Row, *, long: bool, folder: Path) -> Found:
    """One campaign in a process of its own, and in a folder that is removed with all the others."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        form = row.long if long else row.short
        chosen = [place if word == "FOLDER" else word for word in form.arguments.split()]
        command = [sys.executable, "-m", f"tests.campaigns.{row.module}", *chosen]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
    try:
        said = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return Found(row, seconds, {}, [f"exit code {done.returncode}, no verdict: {done.stderr[-3000:]}"])
    wrong = [str(one) for one in said["wrong"]]
    few = [] if "skipped" in said else [(n, least) for n, least in form.least.items() if figure(said, n) < least]
    wrong += [f"only {figure(said, name):,} {name} of at least {least:,}" for name, least in few]
    return Found(row, seconds, said, wrong)


def figure(said: dict[str, Any], name: str) -> int:
    """A figure of a campaign by its name, or by those of the groups it is in, as `without fsync/wrong`; 0 for none."""
    found: Any = said
    for part in name.split("/"):
        found = found.get(part, 0) if isinstance(found, dict) else 0
    return int(found)


def say(text: str) -> None:
    """A line for whoever waits."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def line_of(found: Found) -> str:
    """A line on a row, and one for each of the first things that are wrong."""
    points = f"{found.said.get('points', 0):,} points"
    head = f"{found.row.title:28} {points:>20} {found.seconds:7.1f} s  {found.verdict}"
    return "\n".join([f"{head}  {found.figures}", *(f"    {one}" for one in found.wrong[:10])])


def store(folder: Path, results: Sequence[Found], *, long: bool) -> None:
    """Put what was found into torture.json, each row in the place of its former figures, and the table of the long
    forms into RESULTS.md."""
    sys.path.insert(0, str(ROOT / "bench"))
    from measure import machine
    from results import write_section

    path = folder / "torture.json"
    kept = {entry["title"]: entry for entry in json.loads(path.read_text())["rows"]} if path.exists() else {}
    day = time.strftime("%Y-%m-%d", time.gmtime())
    for one in results:
        command = f"scripts/torture{' --long' if long else ''} --only {one.row.module}"
        kept[one.row.title] = {
            "title": one.row.title, "points": one.said.get("points", 0), "wrong": len(one.wrong),
            "skipped": one.said.get("skipped", ""), "seconds": round(one.seconds), "figures": one.figures,
            "kinds": one.said.get("kinds", []), "day": day, "command": command, "machine": machine(),
        }  # fmt: skip
    rows = [kept[row.title] for row in ROWS if row.title in kept]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    write_section(folder, "torture", table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows in Markdown, and how many kinds of faults there were."""
    lines = ["| campaign | command | points | wrong | seconds | figures |", "|---|---|---|---|---|---|"]
    for row in rows:
        wrong = row["skipped"] or row["wrong"]
        cells = (row["title"], f"`{row['command']}`", f"{row['points']:,}", wrong, row["seconds"], row["figures"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    where = sorted({f"{row['day']}, {row['machine']}" for row in rows})
    return "\n".join([*(f"{place}." for place in where), "", *lines, "", f"{len(kinds)} kinds: {', '.join(kinds)}."])


def run_all(rows: Sequence[Row], jobs: int, *, long: bool, folder: Path) -> Iterator[Found]:
    """What came of each row: those that share the machine first, in their order."""
    with ThreadPoolExecutor(jobs) as pool:
        together = [pool.submit(run_row, row, long=long, folder=folder) for row in rows if not row.alone]
        yield from (future.result() for future in together)
    yield from (run_row(row, long=long, folder=folder) for row in rows if row.alone)


def main() -> int:
    """Run, say, write, judge."""
    parser = argparse.ArgumentParser(description="Run the campaigns against faults.")
    modules = sorted({row.module for row in ROWS})
    parser.add_argument("--long", action="store_true", help="the long forms: hours")
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="these campaigns only", choices=modules)
    parser.add_argument("--results", type=Path, help="write the figures into RESULTS.md of this directory")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="campaigns at a time (default: cores)")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if not arguments.only or row.module in arguments.only]
    results: list[Found] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="streammerge-") as folder:
        for found in run_all(rows, arguments.jobs, long=arguments.long, folder=Path(folder)):
            results.append(found)
            say(line_of(found))
            if arguments.results:
                store(arguments.results, results, long=arguments.long)
    bad = sum(bool(one.wrong) for one in results)
    points = sum(one.said.get("points", 0) for one in results)
    say(f"{len(results)} campaigns, {points:,} points, {bad} with faults, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
