"""What it costs that an output is durable and checked: `streammerge run` as it is, and without all of that.

    python bench/durability.py --dir DIR

runs both in turn on the same base and adapter, the files of both dropped from the page cache before each run: the
command with its defaults, and `unprotected.py`, which syncs nothing, digests nothing and checks nothing. The time is
that of the process alone. The figures are medians; the cost is the median of the ratios of runs of the same round, so
that a disk which is not as fast now as it was a minute ago counts for both.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bases import Base, bases_of, size_of
from measure import STREAMMERGE, compile_package, evict, median, parser_of, run, working_directory
from results import RESULTS, Entry, about, load, origins, store, write_section

WAYS: Mapping[str, Sequence[str]] = {
    "protected": (*STREAMMERGE, "run"),
    "unprotected": (sys.executable, str(Path(__file__).parent / "unprotected.py")),
}


def measure(base: Base, rank: int, rounds: int, directory: Path, results: Path) -> None:
    """All rounds on one base, stored after each; every other round begins with the other way."""
    root, adapter = base.build(directory, rank)
    output = directory / "output"
    entry = about() | {"base": base.name, "bytes": size_of(root), "rank": rank, "rounds": []}
    for number in range(rounds):
        seconds: dict[str, float] = {}
        for name in list(WAYS)[:: 1 if number % 2 else -1]:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()
            evict([directory / base.name])
            used = run([*WAYS[name], root, adapter, "-o", output])
            seconds[name] = used.seconds
            print(
                f"{base.name:12} round {number + 1} {name:12} {used.seconds:6.2f} s {used.cpu_seconds:6.2f} CPU s",
                flush=True,
            )
        entry["rounds"].append(seconds)
        store(results / "durability.json", entry)
    shutil.rmtree(output, ignore_errors=True)


def verdict(entry: Entry) -> str:
    """One line on a base: both medians, and what the protection costs."""
    with_it, without = (median([one[name] for one in entry["rounds"]]) for name in WAYS)
    ratios = [one["protected"] / one["unprotected"] for one in entry["rounds"]]
    cost = f"{median(ratios) - 1:+.1%} (rounds from {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%})"
    return f"{entry['base']}, r={entry['rank']}: {with_it:.2f} s, without it {without:.2f} s: {cost}"


def write_durability(results: Path) -> None:
    """The section of RESULTS.md out of durability.json."""
    entries = load(results / "durability.json")
    lines = "\n".join(f"- {verdict(entry)}" for entry in entries)
    write_section(results, "durability", f"{origins(entries)}\n\n{lines}")


def main() -> None:
    """Measure, print, write."""
    parser = parser_of(__doc__)
    parser.add_argument("--bases", type=bases_of, default="llama-4GB", help="default llama-4GB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where RESULTS.md is (default: here)")
    arguments = parser.parse_args()
    compile_package()
    with working_directory(arguments.dir) as directory:
        for base in arguments.bases:
            measure(base, arguments.rank, arguments.rounds, directory, arguments.results)
    write_durability(arguments.results)
    print("\n".join(verdict(entry) for entry in load(arguments.results / "durability.json")))


if __name__ == "__main__":
    main()
