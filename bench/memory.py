"""Peak memory of `streammerge run` on every base of the benchmarks, each run in a process of its own.

    python bench/memory.py --dir DIR

prints the peak of the resident set as the kernel kept it (`ru_maxrss`: everything of ours that was in memory, mapped
pages included), with the largest anonymous and file-backed parts seen on the way, and beside it what importing torch
and one product take: that part is not ours. One base is also merged in a memory cgroup of 640 MB, where that is
permitted (root). Then bases of 1 GB and of 141 GB, the second one of holes, are streamed with an adapter of rank 16
and written nowhere, to see what grows (4 minutes). Table and JSON go beside RESULTS.md; a base that is measured again
takes the place of its old figures.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bases import ALL, STREAMED, Base, base_of, bases_of, ranks_of, size_of
from cgroups import memory_cgroup
from measure import FIELDS, STREAMMERGE, Usage, compile_package, machine, parser_of, run, working_directory
from results import RESULTS, about, load, origins, store, write_section

from streammerge.core.text import parse_size, size_text

IMPORTS = "import torch; torch.set_num_threads(1); a = torch.ones(64, 64, dtype=torch.float64); a @ a"
RANK = 16
"""Of the adapters of the bases that are merged in a cgroup, or streamed."""
Run = dict[str, Any]


def command_of(base: Base, rank: int, directory: Path, options: Sequence[str]) -> list[str | Path]:
    """What merges a base into `directory`/merged."""
    root, adapter = base.build(directory, rank)
    return [*STREAMMERGE, "run", root, adapter, "-o", directory / "merged", *options]


def peak_of(label: str, command: Sequence[str | Path], output: Path | None = None) -> Run:
    """The peak of a command and its parts, in bytes; also printed. `output` is removed."""
    used = run(command, watch=True)
    if output:
        shutil.rmtree(output)
    return told(label, used)


def told(label: str, used: Usage) -> Run:
    """The peak of a process that has ended, and its parts; also printed."""
    seen = "  ".join(f"{name} {used.resident.get(name, 0) / 1e6:.1f} MB" for name in FIELDS)
    print(f"{label:34} peak {used.max_rss / 1e6:7.1f} MB   (largest seen: {seen})", flush=True)
    return {"max_rss": used.max_rss} | {name: used.resident.get(name, 0) for name in FIELDS}


def limited(base: Base, directory: Path, limit: int, options: Sequence[str]) -> Run:
    """One run in a cgroup of `limit` bytes at the usual rank; SystemExit if it does not finish. Where none can be made
    the reason takes the place of the figures."""
    command = command_of(base, RANK, directory, options)
    with memory_cgroup(limit) as group:
        if isinstance(group, str):
            print(f"NOT MEASURED: {base.name} in {size_text(limit)}: {group}", flush=True)
            return {"limit": limit, "refused": group}
        found = peak_of(f"{base.name} in {size_text(limit)}", group.command(command), directory / "merged")
        return found | {"limit": limit, "charged": group.peak()}


def streamed(base: Base, directory: Path) -> dict[str, Any]:
    """The entry of a base that is streamed and written nowhere: its peak, and what each step left."""
    command = [sys.executable, Path(__file__).parent / "streamed.py", *base.build(directory, RANK)]
    used = run(command, watch=True)
    label = f"{base.name}, streamed"
    entry = about() | {"base": label, "bytes": size_of(directory / base.name / "base")}
    entry |= {"peaks": {str(RANK): [told(label, used)]}, "streamed": json.loads(used.output)}
    for step, found in entry["streamed"]["steps"].items():
        parts = "  ".join(f"{name} {found[name] / 1e6:.1f} MB" for name in ("VmRSS", "VmHWM", "RssAnon", "RssFile"))
        print(f"  {step:32} {found['seconds']:7.1f} s   {parts}", flush=True)
    return entry


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The peaks of all bases as a table in Markdown."""
    lines = ["| | size | r | peak | anonymous | file-backed |", "|---|---|---|---|---|---|"]
    for entry in entries:
        for rank, runs in entry["peaks"].items():
            parts = (max(one[name] for one in runs) / 1e6 for name in ("max_rss", "RssAnon", "RssFile"))
            figures = " | ".join(f"{part:.0f} MB" if part else "" for part in parts)
            size = size_text(entry["bytes"]) if entry["bytes"] else ""
            lines.append(f"| {entry['base']} | {size} | {rank if rank != '-' else ''} | {figures} |")
    return "\n".join(lines)


def limits(entries: Sequence[dict[str, Any]]) -> str:
    """What came of the runs in a cgroup, a line for each."""
    lines = []
    for entry in entries:
        for one in entry.get("limited", ()):
            name = f"{entry['base']} in a memory cgroup of {size_text(one['limit'])}"
            done = f"finished, peak {one.get('max_rss', 0) / 1e6:.0f} MB"
            lines.append(f"- {name}: {'not measured: ' + one['refused'] if 'refused' in one else done}.")
    return "\n".join(lines)


def growth(entries: Sequence[dict[str, Any]]) -> str:
    """What the streamed bases took, from the smallest to the largest, and how much that is more."""
    found = sorted((entry for entry in entries if "streamed" in entry), key=lambda entry: int(entry["bytes"]))
    lines = []
    for entry in found:
        end, plan = (entry["streamed"]["steps"][step] for step in ("reported", "planned"))
        seconds = f"planned after {plan['seconds']:.1f} s, done after {end['seconds']:.1f} s"
        left = f"{end['RssAnon'] / 1e6:.0f} MB anonymous and {end['RssFile'] / 1e6:.0f} MB of files left in the end"
        report = f"a report of {size_text(entry['streamed']['report_bytes'])}"
        lines.append(f"- {entry['base']}: {seconds}, peak {end['VmHWM'] / 1e6:.0f} MB, {left}, {report}.")
    if len(found) > 1:
        small, large = (entry["streamed"]["steps"]["reported"]["VmHWM"] for entry in (found[0], found[-1]))
        times = found[-1]["bytes"] / found[0]["bytes"]
        lines.append(f"- A base {times:.0f} times as large took {(large - small) / 1e6:+.0f} MB.")
    return "\n".join(lines)


def write_memory(results: Path) -> None:
    """The section of RESULTS.md out of memory.json."""
    entries = load(results / "memory.json")
    parts = (origins(entries), table(entries), limits(entries), growth(entries))
    write_section(results, "memory", "\n\n".join(part for part in parts if part))


def main() -> None:
    """Measure, print and write."""
    parser = parser_of(__doc__)
    parser.add_argument("--bases", type=bases_of, default=ALL, help=f"default {ALL}")
    parser.add_argument("--ranks", type=ranks_of, default="16,64", help="default 16,64")
    parser.add_argument("--runs", type=int, default=1, help="of each; the largest peak counts (default 1)")
    parser.add_argument("--limit", type=parse_size, default="640MB", help="of the cgroup (default 640MB)")
    parser.add_argument("--limited", type=base_of, default="one-tensor", help="what is merged in it")
    parser.add_argument("--streamed", type=bases_of, default=STREAMED, help=f"default {STREAMED}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where RESULTS.md is (default: here)")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="further options of `streammerge run`")
    arguments = parser.parse_args()
    print(machine())
    compile_package()
    kept = arguments.results / "memory.json"
    imports = peak_of("importing torch, one product", [sys.executable, "-c", IMPORTS])
    store(kept, about() | {"base": "importing torch", "bytes": 0, "peaks": {"-": [imports]}})
    with working_directory(arguments.dir) as directory:
        output = directory / "merged"
        shutil.rmtree(output, ignore_errors=True)
        for base in arguments.bases:
            peaks: dict[str, list[Run]] = {}
            for rank in arguments.ranks:
                command = command_of(base, rank, directory, arguments.options)
                label = f"{base.name}, r={rank}"
                peaks[str(rank)] = [peak_of(label, command, output) for _ in range(arguments.runs)]
            entry = about() | {"base": base.name, "bytes": size_of(directory / base.name / "base"), "peaks": peaks}
            if base == arguments.limited:
                entry["limited"] = [limited(base, directory, arguments.limit, arguments.options)]
            store(kept, entry)
        for base in arguments.streamed:
            store(kept, streamed(base, directory))
    write_memory(arguments.results)


if __name__ == "__main__":
    main()
