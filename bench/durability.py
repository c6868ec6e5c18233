"""What it costs that an output is durable and checked: `streammerge run` as it is, and without parts of that.

    python bench/durability.py --dir DIR

runs three commands in turn on the same base and adapter, the files of all dropped from the page cache before each run:
`checked` is the command with its defaults, `protected` leaves out the check after the run, `unprotected` (by
`protection.py`) also syncs and digests nothing. The time is that of the process alone. Costs are ratios of medians,
and medians of the ratios of runs of the same round, so that a disk which is slower now than it was a minute ago counts
for both. A last run of each round, `timed`, has clocks on the calls: what syncs and digests took of the threads, which
is more than they can have cost.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bases import Base, bases_of, size_of
from measure import STREAMMERGE, Usage, compile_package, evict, median, parser_of, run, working_directory
from results import RESULTS, Entry, about, load, origins, store, write_section

WAYS: Mapping[str, Sequence[str]] = {
    "checked": (*STREAMMERGE, "run"),
    "protected": (*STREAMMERGE, "run", "--no-verify"),
    "unprotected": (sys.executable, str(Path(__file__).parent / "protection.py"), "without"),
}
TIMED = (sys.executable, str(Path(__file__).parent / "protection.py"), "timed")


def measure(base: Base, rank: int, rounds: int, directory: Path, results: Path) -> None:
    """All rounds on one base, stored after each; the order within a round is drawn."""
    root, adapter = base.build(directory, rank)
    output = directory / "output"

    def once(command: Sequence[str]) -> Usage:
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        evict([directory / base.name])
        return run([*command, root, adapter, "-o", output])

    entry = about() | {"base": base.name, "bytes": size_of(root), "rank": rank, "workers": len(os.sched_getaffinity(0))}
    entry |= {"rounds": [], "cpu": [], "timed": []}
    for number in range(rounds):
        used = {name: once(WAYS[name]) for name in random.sample(list(WAYS), len(WAYS))}
        for name, one in used.items():
            print(f"{base.name:12} round {number + 1} {name:12} {one.seconds:6.2f} s {one.cpu_seconds:6.2f} CPU s")
        timed = json.loads(once(TIMED).output.splitlines()[-1])
        print(f"{base.name:12} round {number + 1} timed        {timed}", flush=True)
        entry["rounds"].append({name: one.seconds for name, one in used.items()})
        entry["cpu"].append({name: one.cpu_seconds for name, one in used.items()})
        entry["timed"].append(timed)
        store(results / "durability.json", entry)
    shutil.rmtree(output, ignore_errors=True)


def cost(rounds: Sequence[Mapping[str, float]], more: str, less: str) -> str:
    """What one way took beyond another: of the medians, and of the rounds."""
    whole = median([one[more] for one in rounds]) / median([one[less] for one in rounds])
    ratios = [one[more] / one[less] for one in rounds]
    return f"{whole - 1:+.1%} of the medians, {median(ratios) - 1:+.1%} as the median of {len(rounds)} rounds"


def verdict(entry: Entry) -> str:
    """All medians of a base, and what each protection costs."""
    rounds = entry["rounds"]
    times = ", ".join(
        f"{name} {median([one[name] for one in rounds]):.2f} s"
        f" ({median([one[name] for one in entry['cpu']]):.2f} CPU s)"
        for name in WAYS
    )
    spent = {name: median([one[name] for one in entry["timed"]]) for name in ("sync", "digest")}
    most = (spent["sync"] + spent["digest"] / entry["workers"]) / median([one["unprotected"] for one in rounds])
    return (
        f"{entry['base']}, r={entry['rank']}: {times}\n"
        f"  - sync and digests: {cost(rounds, 'protected', 'unprotected')}; by the clocks {spent['sync']:.3f} s of"
        f" sync and {spent['digest']:.2f} s of digests on {entry['workers']} threads, at most {most:+.1%}\n"
        f"  - the check after the run: {cost(rounds, 'checked', 'protected')}"
    )


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
