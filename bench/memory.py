"""Peak memory of `streammerge run` on a base with two tables of 1 GiB, in a process of its own.

    python bench/memory.py

An adapter of rank 16 changes every linear layer and both tables. Prints the peak of the resident set, as the kernel
kept it, with the largest anonymous and file-backed parts seen on the way, and beside it what importing torch and one
product take: that part is not ours.
"""

from __future__ import annotations

import shutil
import sys

from measure import STREAMMERGE, machine, make_base, parser_of, run, working_directory

IMPORTS = "import torch; torch.set_num_threads(1); a = torch.ones(64, 64, dtype=torch.float64); a @ a"


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--size", default="2GB", help="bytes of the base; 2GB has tables of 1 GiB (default)")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--kind", default="big-tensors", help="as for make_base.py (default big-tensors)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("options", nargs="*", metavar="-- OPTION", help="further options of `streammerge run`")
    arguments = parser.parse_args()
    print(machine())
    imports = run([sys.executable, "-c", IMPORTS])
    print(f"{'importing torch, one product':34} peak {imports.max_rss / 1e6:7.1f} MB")
    with working_directory(arguments.dir) as directory:
        base, adapter = make_base(
            directory, "--kind", arguments.kind, "--size", arguments.size, "--rank", arguments.rank
        )
        for _ in range(arguments.runs):
            output = directory / "merged"
            command = [*STREAMMERGE, "run", base, adapter, "-o", output, *arguments.options]
            used = run(command, watch=True)
            shutil.rmtree(output)
            seen = "  ".join(f"{name} {value / 1e6:.1f} MB" for name, value in used.resident.items())
            print(f"{'streammerge run':34} peak {used.max_rss / 1e6:7.1f} MB   (largest seen: {seen})")


if __name__ == "__main__":
    main()
