"""Whether an output is the same bytes however it was made: for every number of workers, budget and way of writing.

    python bench/digests.py --dir DIR

merges a base of 1 GB in bfloat16 and one in float32 with 1, 2 and 5 workers, three budgets, directly and through the
page cache, and takes the SHA-256 of the whole output each time: names and bytes of all its files, streammerge.json
among them. One line for each run, the verdict at the end, exit code 1 unless it is one digest for each base. All of it
goes to digests.json, the verdict into RESULTS.md.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from bases import Base, bases_of, size_of
from measure import STREAMMERGE, compile_package, machine, parser_of, run, working_directory
from results import RESULTS, Entry, about, load, origins, store, write_section

from streammerge.core.text import count_text

Axes = Mapping[str, Sequence[str]]
"""The values of each option of `streammerge run`."""


def digest_of(root: Path) -> str:
    """SHA-256 of the names and the bytes of all files below a directory."""
    whole = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            whole.update(hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def merged(base: Base, rank: int, directory: Path, axes: Axes) -> dict[str, str]:
    """The digest of every combination of options."""
    root, adapter = base.build(directory, rank)
    output = directory / "merged"
    found: dict[str, str] = {}
    for values in itertools.product(*axes.values()):
        chosen = [part for pair in zip(axes, values, strict=True) for part in pair]
        shutil.rmtree(output, ignore_errors=True)
        used = run([*STREAMMERGE, "run", root, adapter, "-o", output, *chosen])
        found[" ".join(chosen)] = digest_of(output)
        print(f"{base.name:15} {' '.join(chosen):45} {used.seconds:6.2f} s  {found[' '.join(chosen)]}", flush=True)
    shutil.rmtree(output, ignore_errors=True)
    return found


def verdict(entry: Entry) -> str:
    """One line on a base: whether all its runs have one digest."""
    found = set(entry["digests"].values())
    runs = count_text(len(entry["digests"]), "run")
    ways = "; ".join(f"{name} {', '.join(values)}" for name, values in entry["axes"].items())
    if len(found) == 1:
        return f"{entry['base']}: the same in {runs} ({ways}): `{found.pop()}`"
    return f"{entry['base']}: NOT THE SAME: {len(found)} digests in {runs} ({ways})"


def write_digests(results: Path) -> None:
    """The section of RESULTS.md out of digests.json."""
    entries = load(results / "digests.json")
    lines = "\n".join(f"- {verdict(entry)}" for entry in entries)
    write_section(results, "digests", f"{origins(entries)}\n\n{lines}")


def main() -> None:
    """Merge, print, write, judge."""
    parser = parser_of(__doc__)
    parser.add_argument("--bases", type=bases_of, default="llama-1GB,llama-1GB-fp32", help="default llama-1GB and fp32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--workers", default="1,2,5", help="default 1,2,5")
    parser.add_argument("--memory", default="48MB,128MB,1GB", help="default 48MB,128MB,1GB")
    parser.add_argument("--io", default="direct,buffered", help="default direct,buffered")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where RESULTS.md is (default: here)")
    arguments = parser.parse_args()
    axes = {f"--{name}": getattr(arguments, name).split(",") for name in ("workers", "memory", "io")}
    print(machine())
    compile_package()
    entries = []
    with working_directory(arguments.dir) as directory:
        for base in arguments.bases:
            entry = about() | {"base": base.name, "axes": axes}
            entry["digests"] = merged(base, arguments.rank, directory, axes)
            entry["bytes"] = size_of(directory / base.name / "base")
            store(arguments.results / "digests.json", entry)
            entries.append(entry)
    write_digests(arguments.results)
    for entry in entries:
        print(verdict(entry))
    if any(len(set(entry["digests"].values())) > 1 for entry in entries):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
