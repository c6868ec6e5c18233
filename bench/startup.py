"""How long the command line takes before it does any work: `--help`, and a plan on the headers of a 70B model.

    python bench/startup.py

The base has the 723 tensors of Llama 3 70B in files without content, the adapter rank 8 on every linear layer; its
values are real, and a plan reads all of them. Each figure is a median over whole processes, after one that is not
counted: compiled modules and the page cache are warm, as they are for anybody's second command.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import STREAMMERGE, Usage, machine, make_base, median, parser_of, run, working_directory


def timed(name: str, command: Sequence[str | Path], runs: int) -> None:
    """Run a command once and then `runs` times, and print the medians of these."""
    run(command)
    used: list[Usage] = [run(command) for _ in range(runs)]
    wall, cpu = median([one.seconds for one in used]), median([one.cpu_seconds for one in used])
    fastest, peak = min(one.seconds for one in used), max(one.max_rss for one in used)
    print(
        f"{name:34} median of {runs}: {wall:6.3f} s   fastest {fastest:6.3f} s   "
        f"CPU {cpu:6.3f} s   peak {peak / 1e6:5.0f} MB"
    )


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--kind", default="sparse-70b", help="as for make_base.py (default sparse-70b)")
    parser.add_argument("--size", default="2GB", help="bytes of the base, for other kinds than sparse-70b")
    parser.add_argument("--rank", default="8")
    parser.add_argument("--adapter-dtype", default="F32")
    arguments = parser.parse_args()
    print(machine())
    with working_directory(arguments.dir) as directory, tempfile.TemporaryDirectory() as compiled:
        # An installed package has its modules compiled; a checkout may be told not to keep them.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = compiled
        options = ["--kind", arguments.kind, "--size", arguments.size]
        options += ["--rank", arguments.rank, "--adapter-dtype", arguments.adapter_dtype]
        base, adapter = make_base(directory, *options)
        timed("python -c pass", [sys.executable, "-c", "pass"], arguments.runs)
        timed("streammerge --help", [*STREAMMERGE, "--help"], arguments.runs)
        timed("python -c 'import numpy'", [sys.executable, "-c", "import numpy"], arguments.runs)
        timed("streammerge plan", [*STREAMMERGE, "plan", base, adapter], arguments.runs)


if __name__ == "__main__":
    main()
