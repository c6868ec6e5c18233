"""What RESULTS.md shows of a comparison: its two tables and its plot, out of comparison.json.

    python bench/tables.py

writes them again. Ratios are of runs of the same round and on the same kind of cold cache, medians over the rounds;
figures of a cost per byte are quotients of medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bases import base_of
from measure import median
from plot import Mark, Row, chart
from results import RESULTS, Entry, load, origins, write_section

TITLES = {
    "copy": "`cp -r` and sync",
    "streammerge": "streammerge",
    "peft": "PEFT 0.21.2",
    "tinker": "tinker-cookbook 0.6.1, shards",
    "axolotl": "axolotl 0.19.0, memory-efficient",
}
Case = tuple[str, int | None, str]
"""Contender, rank, and what was cold."""


@dataclass(frozen=True)
class Summary:
    """One case on a base: its runs, one of each round, and ratios within the rounds: to the copy, to streammerge, and
    to the lowest rank of the same contender; None against itself."""

    base: str
    contender: str
    rank: int | None
    cold: str
    runs: Sequence[Entry]
    to_copy: float | None
    to_own: float | None
    to_lowest: float | None

    def median(self, figure: str) -> float:
        """The median of one figure over the runs."""
        return median([run[figure] for run in self.runs])

    @property
    def gigabytes(self) -> float:
        """Size of the output."""
        return self.median("bytes") / 1e9


def summaries(entry: Entry) -> Iterator[Summary]:
    """Every case of an entry, in the order of a round."""
    rounds = [{(run["contender"], run["rank"], run["cold"]): run for run in runs} for runs in entry["rounds"]]
    for contender, rank, cold in rounds[0]:
        lowest = min((other for name, other, _ in rounds[0] if name == contender and other), default=None)

        def against(name: str, other: int | None, case: Case = (contender, rank, cold)) -> float | None:
            wanted = (name, other, case[2])
            return None if wanted == case else ratio([one[case] for one in rounds], [one.get(wanted) for one in rounds])

        runs = [one[contender, rank, cold] for one in rounds]
        ratios = (against("copy", None), against("streammerge", rank), against(contender, lowest))
        yield Summary(entry["base"], contender, rank, cold, runs, *ratios)


def ratio(runs: Sequence[Entry], others: Sequence[Entry | None]) -> float | None:
    """The median of the ratios of wall times within the rounds; None where the other one was not measured."""
    found = [run["seconds"] / other["seconds"] for run, other in zip(runs, others, strict=True) if other]
    return median(found) if found else None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def comparison_table(entries: Iterable[Entry]) -> str:
    """All cases on all bases."""
    head = ["base", "r", "", "cold", "wall, median (range)", "of it sync", "per GB"]
    head += ["to copy", "to streammerge", "to lowest r", "CPU", "peak"]
    rows = []
    for one in (summary for entry in entries for summary in summaries(entry)):
        seconds = [run["seconds"] for run in one.runs]
        wall = f"{median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
        ratios = ["" if value is None else f"{value:.2f}" for value in (one.to_copy, one.to_own, one.to_lowest)]
        peak = max(run["max_rss"] for run in one.runs) / 1e6
        cells = [one.base, str(one.rank or ""), TITLES[one.contender], one.cold, wall]
        cells += [f"{one.median('sync_seconds'):.2f} s", f"{one.median('seconds') / one.gigabytes:.2f} s", *ratios]
        rows.append([*cells, f"{one.median('cpu_seconds'):.1f} s", f"{peak:.0f} MB"])
    return table(head, rows)


def flatness_table(entries: Iterable[Entry]) -> str:
    """Seconds per GB of every case on bases that differ in size only, with the largest quotient of two of them, and
    what each further GB costs from one size to the next: start-up is in the first and not in the second."""
    cases: dict[tuple[str, str, str, str], list[Summary]] = {}
    for one in (summary for entry in entries for summary in summaries(entry)):
        base = base_of(one.base)
        kind = base.name.replace(f"-{base.size}", "")
        cases.setdefault((kind, str(one.rank or ""), TITLES[one.contender], one.cold), []).append(one)
    rows = []
    for case, found in cases.items():
        sizes = sorted(found, key=lambda one: one.gigabytes)
        if len(sizes) == 1:
            continue
        each = {base_of(one.base).size: one.median("seconds") / one.gigabytes for one in sizes}
        steps = [
            f"{small.gigabytes:.0f} to {large.gigabytes:.0f} GB: {further(small, large):.2f} s"
            for small, large in pairwise(sizes)
        ]
        spread = max(each.values()) / min(each.values())
        per_size = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in each.items())
        rows.append([*case, per_size, f"{spread:.2f}", ", ".join(steps)])
    head = ["bases", "r", "", "cold", "per GB", "largest to smallest", "each further GB"]
    return table(head, rows) if rows else ""


def further(small: Summary, large: Summary) -> float:
    """Seconds of each GB by which one base is larger than the other."""
    return (large.median("seconds") - small.median("seconds")) / (large.gigabytes - small.gigabytes)


def mark(one: Summary) -> Mark:
    """A contender's place in the chart. What copying holds in memory is less than what this process leaves to it."""
    return Mark(one.median("seconds"), None if one.contender == "copy" else one.median("max_rss") / 1e9)


def comparison_chart(entries: Sequence[Entry]) -> str:
    """Wall time and peak memory of all contenders on all bases, on the coldest of the caches each was measured on, as
    SVG."""
    rows: dict[str, Row] = {}
    for entry in entries:
        found = list(summaries(entry))
        first = [one for one in found if one.cold == found[0].cold]
        for rank in sorted({one.rank for one in first if one.rank}):
            label = f"{entry['base']}, r={rank}"
            rows[label] = {one.contender: mark(one) for one in first if one.rank in (rank, None)}
    titles = {name: title.replace("`", "") for name, title in TITLES.items()}
    return chart(rows, titles, ("wall time, s", "peak memory, GB"))


def write_comparison(results: Path) -> None:
    """Tables and plot out of comparison.json."""
    entries = load(results / "comparison.json")
    (results / "comparison.svg").write_text(comparison_chart(entries))
    picture = "![Wall time and peak memory of each contender on each base](comparison.svg)"
    parts = (origins(entries), comparison_table(entries), flatness_table(entries), picture)
    write_section(results, "comparison", "\n\n".join(part for part in parts if part))


def main() -> None:
    """Write tables and plot again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where comparison.json is (default: here)")
    write_comparison(parser.parse_args().results)


if __name__ == "__main__":
    main()
