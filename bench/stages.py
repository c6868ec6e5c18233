"""The stages of a merge one at a time, so that one can see which is the limit: reading, arithmetic, writing, and torch.

    python bench/stages.py --dir DIR

reads a base of 1 GB in every way there is, cold (its files dropped from the page cache) and warm; merges it, warm, into
nothing, for one worker and for all, two ranks and both precisions; times every step of one tile; writes files of its
size, from memory and copied out of the cold base; and imports torch. Prints tables and puts them into RESULTS.md, with
stages.json beside it. All but the import happens in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bases import Base, base_of, ranks_of, size_of
from measure import machine, median, parser_of, run, working_directory
from results import RESULTS, Entry, about, load, origins, store, write_section
from tables import table

from streammerge.core.machine import available_cores

Rows = Sequence[dict[str, Any]]


def measured(base: Base, directory: Path, ranks: Sequence[int], seconds: float) -> Entry:
    """All stages on one base."""
    from stage_runs import read_rows, tile_rows, write_rows
    from stage_steps import step_columns

    adapters = {rank: base.build(directory, rank)[1] for rank in ranks}
    root = directory / base.name / "base"
    paths = sorted(root.glob("*.safetensors"))
    workers = sorted({1, available_cores()})
    entry = about() | {"base": base.name, "bytes": size_of(root), "torch": importing()}
    entry |= {"read": told(read_rows(paths, workers))}
    entry |= {"write": told(write_rows(paths, directory, workers[-1]))}
    entry |= {"tile": told(tile_rows(root, adapters, workers)), "steps": step_columns(root, adapters, seconds)}
    return entry


def importing() -> list[dict[str, float]]:
    """Importing torch in a process of its own, warm; the first time is not counted."""
    command = [sys.executable, "-c", "import torch"]
    run(command)
    used = [run(command) for _ in range(3)]
    return [{"seconds": one.seconds, "cpu_seconds": one.cpu_seconds} for one in used]


def told(rows: Iterable[dict[str, Any]]) -> Rows:
    """The rows, each printed when it is there."""
    kept = []
    for row in rows:
        what = "  ".join(str(value) for name, value in row.items() if name not in ("seconds", "cpu_seconds", "bytes"))
        print(f"{what:36} {'  '.join(rate(row))}", flush=True)
        kept.append(row)
    return kept


def rate(row: dict[str, Any]) -> tuple[str, str]:
    """GB/s, and CPU seconds per GB."""
    size = row["bytes"] / 1e9
    return f"{size / row['seconds']:.2f} GB/s", f"CPU {row['cpu_seconds'] / size:.2f} s/GB"


def stage_table(entry: Entry) -> str:
    """The rows of reading, arithmetic and writing."""
    rows = []
    for row in (*entry["read"], *entry["tile"], *entry["write"]):
        how = {
            "read": lambda row: f"{row['way']}, {row['cache']}",
            "tile": lambda row: f"r={row['r']}, {row['accumulate']}",
            "write": lambda row: f"{row['way']}, from {row['from']}",
        }[row["stage"]](row)
        speed, cpu = rate(row)
        rows.append([entry["base"], row["stage"], how, str(row["workers"]), speed, cpu.removeprefix("CPU ")])
    return table(["base", "stage", "", "workers", "rate", "CPU"], rows)


def steps_table(entry: Entry) -> str:
    """The steps of a tile."""
    columns = entry["steps"]
    head = ["step, ns per element", *(f"r={one['r']}, {one['accumulate']}, {one['tile']}" for one in columns)]
    rows = [[name, *(f"{one['ns'][name]:.3f}" for one in columns)] for name in columns[0]["ns"]]
    return table(head, rows)


def import_line(entry: Entry) -> str:
    """What importing torch takes."""
    wall, cpu = (median([one[figure] for one in entry["torch"]]) for figure in ("seconds", "cpu_seconds"))
    return f"Importing torch, warm: {wall:.2f} s, {cpu:.2f} s of CPU."


def write_stages(results: Path) -> str:
    """The section of RESULTS.md out of stages.json, also returned."""
    entries = load(results / "stages.json")
    parts = [part(entry) for entry in entries for part in (stage_table, steps_table, import_line)]
    text = "\n\n".join([origins(entries), *parts])
    write_section(results, "stages", text)
    return text


def main() -> None:
    """Measure, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--base", type=base_of, default="llama-1GB", help="default llama-1GB")
    parser.add_argument("--ranks", type=ranks_of, default="16,64", help="default 16,64")
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each step of a tile is repeated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where RESULTS.md is (default: here)")
    arguments = parser.parse_args()
    print(machine())
    with working_directory(arguments.dir) as directory:
        entry = measured(arguments.base, directory, arguments.ranks, arguments.seconds)
    store(arguments.results / "stages.json", entry)
    print(f"\n{write_stages(arguments.results)}")


if __name__ == "__main__":
    main()
