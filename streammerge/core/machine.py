"""What of this machine the process may use: cores, and memory for pages of files."""

from __future__ import annotations

import os

from streammerge.core import io

CGROUPS = "/sys/fs/cgroup"
SHARE_OF_MEMORY = 4
"""Pages that are read ahead take at most one in so many of the bytes of memory that are free."""


def available_cores() -> int:
    """Cores by CPU affinity and by the cgroup's CPU quota, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _cgroup_cores() or cores))


def _cgroup_cores() -> int | None:
    """Whole cores of the CPU quota of cgroup v2 or v1, None where there is no quota."""
    quota = io.read_text_or_none(f"{CGROUPS}/cpu.max")
    if quota is None:
        parts = [io.read_text_or_none(f"{CGROUPS}/cpu/cpu.cfs_{part}_us") for part in ("quota", "period")]
        quota = " ".join(part.strip() for part in parts if part)
    match quota.split():
        case [limit, period] if limit.isdigit() and period.isdigit() and int(period):
            return max(1, int(limit) // int(period))
    return None


def room_for_pages() -> int:
    """Bytes of files that may be kept in the page cache for us without crowding anything else out; 0 if unknown."""
    free = [found for found in (_free_memory(), *_cgroup_limits()) if found is not None]
    return min(free, default=0) // SHARE_OF_MEMORY


def _free_memory() -> int | None:
    for line in (io.read_text_or_none("/proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_limits() -> list[int]:
    """The memory limits of this process's cgroup, v1 or v2, and of that at the root, which is ours in a container."""
    own = [line.split(":", 2) for line in (io.read_text_or_none("/proc/self/cgroup") or "").splitlines()]
    folders = {"v2": "/", "v1": "/"}
    for _, controllers, folder in (parts for parts in own if len(parts) == 3):
        if not controllers:
            folders["v2"] = folder
        elif "memory" in controllers.split(","):
            folders["v1"] = folder
    files = [f"{CGROUPS}{folder.rstrip('/')}/memory.max" for folder in ("/", folders["v2"])]
    files += [f"{CGROUPS}/memory{folder.rstrip('/')}/memory.limit_in_bytes" for folder in ("/", folders["v1"])]
    texts = [(io.read_text_or_none(file) or "").strip() for file in files]
    return [int(text) for text in texts if text.isdigit()]
