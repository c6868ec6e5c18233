"""A memory cgroup for one command: a process that needs more than the limit is killed by the kernel.

The page cache that the command fills counts as well, and is given back when the limit is reached; what cannot be given
back is what is tested. Version 1 and 2 of the interface differ in the names of two files. Needs root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VERSIONS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
)
ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True)
class Cgroup:
    """A cgroup of our own. `peak_file` has the most memory that was charged to it, page cache included, in bytes."""

    root: Path
    peak_file: str

    def command(self, command: list[str | Path]) -> list[str | Path]:
        """The command, run inside."""
        return ["sh", "-c", ENTER, self.root / "cgroup.procs", *command]

    def peak(self) -> int:
        """Bytes charged at the worst moment, page cache included."""
        return int((self.root / self.peak_file).read_text())


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Cgroup | str]:
    """A cgroup that holds `limit` bytes, removed afterwards; or the reason why there is none."""
    refused = "no memory cgroups are mounted"
    for mount, limit_file, peak_file in VERSIONS:
        root = mount / f"streammerge-bench-{os.getpid()}"
        if not (mount / "cgroup.procs").exists():
            continue
        try:
            root.mkdir()
        except OSError as error:
            refused = f"no memory cgroup can be made: {error.strerror}"
            continue
        try:
            try:
                (root / limit_file).write_text(f"{limit}\n")
            except OSError as error:
                refused = f"{limit_file} cannot be set: {error.strerror}"
                continue
            yield Cgroup(root, peak_file)
            return
        finally:
            root.rmdir()
    yield refused
