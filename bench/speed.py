"""`streammerge run` against copying the base: how far from the speed of the disk.

    python bench/speed.py --size 2GB --pairs 5

The two take turns, and the ratio is taken within each pair, because a shared disk is not as fast now as it was a
minute ago. Before each run the page cache is emptied where that is permitted (root; it empties it for everybody).
Copying is `cp -r` and then `sync` on each file, since `streammerge run` makes its files durable as well; it also
verifies what it wrote, unless told not to (`-- --no-verify`).
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

from measure import STREAMMERGE, Usage, drop_caches, machine, make_base, median, parser_of, run, working_directory

COPY = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'


def fresh(output: Path, measure: Callable[[], Usage], *, drop: bool) -> Usage:
    """One run that finds no output and, where asked for and permitted, an empty page cache."""
    if drop:
        drop_caches()
    used = measure()
    shutil.rmtree(output)
    return used


def report(name: str, used: list[Usage], size: int) -> None:
    """Print the medians of some runs."""
    wall, cpu = median([one.seconds for one in used]), median([one.cpu_seconds for one in used])
    spread = f"{min(one.seconds for one in used):.2f} to {max(one.seconds for one in used):.2f} s"
    rate, peak = size / wall / 1e6, max(one.max_rss for one in used) / 1e6
    print(f"{name:16} median {wall:6.2f} s ({spread}), {rate:5.0f} MB/s, CPU {cpu:6.2f} s, peak {peak:5.0f} MB")


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--size", default="2GB", help="bytes of the base (default 2GB)")
    parser.add_argument("--kind", default="llama", help="as for make_base.py (default llama)")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--keep-cache", action="store_true", help="do not empty the page cache")
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="further options of `streammerge run`")
    arguments = parser.parse_args()
    print(machine())
    with working_directory(arguments.dir) as directory:
        options = ["--kind", arguments.kind, "--size", arguments.size, "--rank", arguments.rank]
        base, adapter = make_base(directory, *options)
        size = sum(path.stat().st_size for path in base.iterdir())
        drop = not arguments.keep_cache and drop_caches()
        print(f"page cache emptied before each run: {'yes' if drop else 'no'}")
        output = directory / "output"
        copy: list[str | Path] = ["sh", "-c", COPY, "sh", base, output]
        merge = [*STREAMMERGE, "run", base, adapter, "-o", output, *arguments.options]
        copies: list[Usage] = []
        merges: list[Usage] = []
        for number in range(1, arguments.pairs + 1):
            copies.append(fresh(output, lambda: run(copy), drop=drop))
            merges.append(fresh(output, lambda: run(merge), drop=drop))
            ratio = merges[-1].seconds / copies[-1].seconds
            print(
                f"pair {number}: copy {copies[-1].seconds:.2f} s, merge {merges[-1].seconds:.2f} s, ratio {ratio:.2f}"
            )
    report("cp -r and sync", copies, size)
    report("streammerge run", merges, size)
    ratios = [merge.seconds / copy.seconds for merge, copy in zip(merges, copies, strict=True)]
    print(f"{'ratio':16} median {statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
