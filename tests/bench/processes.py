"""Benchmarks as processes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def started(name, *arguments, cwd):
    """Run a benchmark as a person would, from anywhere."""
    return python(BENCH / name, *map(str, arguments), cwd=cwd)


def python(*arguments, cwd):
    """Run Python as the benchmarks are run."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCH.parent), "TMPDIR": str(cwd)},
    )


def bench(name, *arguments, cwd):
    """What a benchmark printed, which ended well."""
    done = started(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def digests(root):
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def section(results, name):
    """What stands in RESULTS.md between the markers of a section."""
    text = (results / "RESULTS.md").read_text()
    return text.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]


def cells(line):
    """The cells of a line of a table."""
    return [cell.strip() for cell in line.strip("|").split("|")]
