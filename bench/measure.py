"""What the benchmarks share: a child process and what it took, the page cache, the machine, medians.

Nothing heavy is imported here: a child starts its life with its parent's resident set, and the kernel counts that as
the child's peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

DROP = Path("/proc/sys/vm/drop_caches")
INTERVAL = 0.005
"""Seconds between two looks at a child's memory; the peak is kept by the kernel and not missed between them."""
STREAMMERGE = (sys.executable, "-m", "streammerge")
FIELDS = ("VmHWM", "RssAnon", "RssFile")


@dataclass
class Usage:
    """What one process and its children took. `resident` has the largest values of FIELDS that were seen, in bytes;
    `max_rss` is the peak that the kernel hands out at the end."""

    seconds: float
    cpu_seconds: float
    max_rss: int
    output: str
    resident: dict[str, int] = field(default_factory=dict)


def run(command: Sequence[str | Path], *, watch: bool = False) -> Usage:
    """Run a command to its end, looking at its memory if asked to; SystemExit with its output if it fails."""
    resident: dict[str, int] = {}
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        child = subprocess.Popen([str(part) for part in command], stdout=output, stderr=subprocess.STDOUT)
        done, status, usage = os.wait4(child.pid, os.WNOHANG if watch else 0)
        while not done:
            look(child.pid, resident)
            time.sleep(INTERVAL)
            done, status, usage = os.wait4(child.pid, os.WNOHANG)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if child.returncode:
        raise SystemExit(f"exit code {child.returncode}: {' '.join(map(str, command))}\n{text}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, text, resident)


def look(pid: int, resident: dict[str, int]) -> None:
    """Raise the values in `resident` to what the process has now."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in FIELDS and rest:
                resident[name] = max(resident.get(name, 0), int(rest.split()[0]) * 1024)


def drop_caches() -> bool:
    """Empty the page cache of what is clean; False where that is not permitted."""
    os.sync()
    try:
        DROP.write_text("3\n")
    except OSError:
        return False
    return True


def evict(roots: Iterable[Path]) -> None:
    """Drop the files below some directories from the page cache, and nothing else; what is not on the disk yet is
    written first. Anybody may do that with files that they may read."""
    for path in (path for root in roots for path in root.rglob("*") if path.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def compile_package() -> None:
    """Compile our modules, as they are in an installed package; a checkout may be told not to keep them, and then the
    processes that are measured are not."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    found = importlib.util.find_spec("streammerge")
    for place in (found and found.submodule_search_locations) or ():
        run([sys.executable, "-m", "compileall", "-q", place])


def median(values: Sequence[float]) -> float:
    """The median; SystemExit without values."""
    if not values:
        raise SystemExit("nothing was measured: ask for at least one run")
    return statistics.median(values)


def make_base(directory: Path, *arguments: str, adapter: str = "adapter") -> tuple[Path, Path]:
    """Base and adapter in `directory`, which are built unless they are there; in another process, for the memory."""
    made = directory / "base", directory / adapter
    if not all(path.exists() for path in (made[0] / "config.json", made[1] / "adapter_config.json")):
        script = Path(__file__).parent / "make_base.py"
        print(run([sys.executable, script, directory, "--adapter", adapter, *arguments]).output.strip(), flush=True)
    return made


@contextmanager
def working_directory(given: Path | None) -> Iterator[Path]:
    """The directory that was given, kept as it is; or a temporary one, removed afterwards."""
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    found = Path(tempfile.mkdtemp(prefix="streammerge-bench-"))
    try:
        yield found
    finally:
        shutil.rmtree(found)


def machine() -> str:
    """One line on the hardware and the kernel, without a name of either."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    versions = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{cpu[1] if cpu else platform.machine()}, {cores} cores, {memory:.0f} GB of memory, {versions}"


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, help="keep base and adapter here, and use them again (default: temporary)")
    return parser
