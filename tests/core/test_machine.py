"""Memory for pages of files: the least of what is free and of what any cgroup of ours allows, a quarter of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from streammerge.core import io, machine

GIB = 2**30
MEMINFO = "MemTotal:       65536000 kB\nMemFree:         1000000 kB\nMemAvailable:   {} kB\nBuffers: 5 kB\n"
FREE = {"/proc/meminfo": MEMINFO.format(8 * 2**20)}
V1 = "12:cpu,cpuacct:/\n5:memory,hugetlb:/docker/abc\n0::/\n"
UNLIMITED_V1 = "9223372036854771712\n"

Files = Callable[[dict[str, str]], None]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Files:
    """Sets the only system files that there are."""

    def use(texts: dict[str, str]) -> None:
        monkeypatch.setattr(io, "read_text_or_none", texts.get)

    return use


def test_a_quarter_of_what_is_available_and_not_of_what_is_there(files: Files) -> None:
    files(FREE)
    assert machine.room_for_pages() == 2 * GIB


def test_nothing_where_nothing_is_known(files: Files) -> None:
    files({})
    assert machine.room_for_pages() == 0
    files({"/proc/meminfo": "MemTotal: 100 kB\n"})
    assert machine.room_for_pages() == 0


@pytest.mark.parametrize(
    ("texts", "room"),
    [
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": f"{GIB}\n"}, GIB // 4),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": "max\n"}, 2 * GIB),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/memory.max": f"{64 * GIB}\n"}, 2 * GIB),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB // 4),
        ({"/sys/fs/cgroup/memory.max": f"{GIB}\n"}, GIB // 4),
        ({"/proc/self/cgroup": "0::/a:b\n", "/sys/fs/cgroup/a:b/memory.max": f"{GIB}\n"}, GIB // 4),
        ({"/proc/self/cgroup": V1, "/sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": f"{GIB}\n"}, GIB // 4),
        ({"/proc/self/cgroup": V1, "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n"}, GIB // 4),
        ({"/proc/self/cgroup": V1, "/sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1}, 2 * GIB),
        ({"/proc/self/cgroup": V1, "/sys/fs/cgroup/memory.max": "max\n"}, 2 * GIB),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/memory.max": "0\n"}, 0),
        ({"/proc/self/cgroup": "nonsense\n\n"}, 2 * GIB),
    ],
    ids=[
        "v2", "v2 without a limit", "v2 above what is free", "v2 at the root", "a namespace without a name",
        "v2 with a colon", "v1", "v1 in a container", "v1 without a limit", "v1 and v2", "v2 of nothing", "nonsense",
    ],
)  # fmt: skip
def test_the_limit_of_a_cgroup_counts_where_it_is_less(files: Files, texts: dict[str, str], room: int) -> None:
    files(FREE | texts)
    assert machine.room_for_pages() == room


def test_the_least_of_several_limits_counts(files: Files) -> None:
    limits = {"/sys/fs/cgroup/memory.max": f"{4 * GIB}\n", "/sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n"}
    files(FREE | limits | {"/proc/self/cgroup": "0::/a\n"})
    assert machine.room_for_pages() == GIB // 2
    files(FREE | limits | {"/proc/self/cgroup": "0::/b\n"})
    assert machine.room_for_pages() == GIB


def test_a_limit_counts_even_where_free_memory_is_unknown(files: Files) -> None:
    files({"/proc/self/cgroup": "0::/a\n", "/sys/fs/cgroup/a/memory.max": f"{GIB}\n"})
    assert machine.room_for_pages() == GIB // 4


def test_this_machine_says_something() -> None:
    assert 0 < machine.room_for_pages() < 2**50
    assert machine.available_cores() >= 1


@pytest.mark.parametrize(
    ("texts", "cores"),
    [
        ({"/sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"/sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_cores_are_those_of_the_quota(
    files: Files, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], cores: int
) -> None:
    files(texts)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert machine.available_cores() == cores
