"""Stages and digests: every one is measured and kept, and what differs is told. No time is looked at."""

import ctypes
import json
import mmap
import os
import re

import pytest

from tests.bench.processes import BENCH, bench, cells, python, section

WAYS = ("mapped", "pread", "direct", "read-ahead")
PAGES = 100
STEPS = ("product", "widening", "adding", "rounding", "finiteness", "digest")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """What the stages of a base of 2 MB were measured as: the entry, its section, and what was printed."""
    root = tmp_path_factory.mktemp("stages")
    (root / "work").mkdir()
    said = bench(
        "stages.py", "--base", "llama-2MB", "--ranks", "4,33", "--seconds", "0", "--results", root / "results",
        cwd=root / "work",
    )  # fmt: skip
    assert list((root / "work").iterdir()) == []
    (entry,) = json.loads((root / "results" / "stages.json").read_text())["entries"]
    return entry, section(root / "results", "stages"), said


def test_every_way_of_reading_and_writing_is_measured_on_all_of_the_base(stages):
    entry, _, _ = stages
    reads = {(row["way"], row["cache"], row["workers"]) for row in entry["read"]}
    workers = {count for _, _, count in reads}
    assert 1 in workers
    assert reads == {(way, cache, count) for way in WAYS for cache in ("cold", "warm") for count in workers}
    writes = {(row["way"], row["from"]) for row in entry["write"]}
    assert writes == {(way, source) for way in ("direct", "buffered") for source in ("memory", "cold files")}
    weights = {row["bytes"] for stage in ("read", "write", "tile") for row in entry[stage]}
    assert len(weights) == 1
    assert 0.99 * entry["bytes"] < weights.pop() <= entry["bytes"]


def test_the_arithmetic_is_measured_for_each_rank_and_precision_and_step_by_step(stages):
    entry, _, _ = stages
    ways = {(row["r"], row["accumulate"]) for row in entry["tile"]}
    assert ways == {(rank, accumulate) for rank in (4, 33) for accumulate in ("float64", "float32")}
    assert [(one["r"], one["accumulate"]) for one in entry["steps"]] == sorted(
        ways, key=lambda way: (way[0], way[1] < "float64")
    )
    for column in entry["steps"]:
        assert set(STEPS) <= column["ns"].keys()
        assert all(value > 0 for value in column["ns"].values())
    # The largest of its linears has 896 rows; a higher rank has larger tiles.
    assert [one["tile"] for one in entry["steps"]] == ["512 x 256 BF16"] * 2 + ["896 x 256 BF16"] * 2


def test_the_stages_stand_in_the_results_as_they_were_printed(stages):
    entry, kept, said = stages
    assert said.endswith(f"{kept}\n")
    rows = [cells(line) for line in kept.splitlines() if line.startswith("| llama-2MB")]
    assert len(rows) == len(entry["read"]) + len(entry["tile"]) + len(entry["write"])
    first = entry["read"][0]
    rate, cpu = first["bytes"] / 1e9 / first["seconds"], first["cpu_seconds"] / (first["bytes"] / 1e9)
    assert rows[0] == ["llama-2MB", "read", "mapped, cold", "1", f"{rate:.2f} GB/s", f"{cpu:.2f} s/GB"]
    assert re.search(r"^Importing torch, warm: \d+\.\d\d s, \d+\.\d\d s of CPU\.$", kept, re.MULTILINE)


def test_an_output_is_the_same_for_all_workers_budgets_and_ways_of_writing(tmp_path):
    (tmp_path / "work").mkdir()
    said = bench(
        "digests.py", "--bases", "llama-2MB,llama-2MB-fp32", "--workers", "1,5", "--memory", "48MB",
        "--io", "direct,buffered", "--results", tmp_path, cwd=tmp_path / "work",
    )  # fmt: skip
    entries = json.loads((tmp_path / "digests.json").read_text())["entries"]
    assert [entry["base"] for entry in entries] == ["llama-2MB", "llama-2MB-fp32"]
    for entry in entries:
        (digest,) = set(entry["digests"].values())
        assert len(entry["digests"]) == len(
            re.findall(rf"^{entry['base']} +--workers .* {digest}$", said, re.MULTILINE)
        )
        assert len(entry["digests"]) == 4
        assert f"{entry['base']}: the same in 4 runs" in section(tmp_path, "digests")
    assert entries[0]["digests"] != entries[1]["digests"]
    assert list((tmp_path / "work").iterdir()) == []


def test_a_digest_that_differs_fails_the_benchmark_and_stands_in_the_results(tmp_path):
    """Outputs that depend on the number of workers, as no run of ours makes them."""
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r}); import digests\n"
        "digests.run = lambda command: (made(command), digests_run(['true']))[1]\n"
        "from measure import run as digests_run\n"
        "from pathlib import Path\n"
        "def made(command):\n"
        "    output = Path(command[command.index('-o') + 1])\n"
        "    output.mkdir()\n"
        "    (output / 'file').write_text(command[command.index('--workers') + 1])\n"
        f"sys.argv[1:] = ['--bases', 'llama-2MB', '--results', {str(tmp_path)!r}]\n"
        "digests.main()\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    last = done.stdout.splitlines()[-1]
    assert last.startswith("llama-2MB: NOT THE SAME: 3 digests in 18 runs")
    assert f"- {last}\n" in (tmp_path / "RESULTS.md").read_text()


def test_a_file_that_is_moved_or_changed_changes_the_digest_of_an_output(tmp_path):
    for root, name, text in (("a", "x", "1"), ("b", "y", "1"), ("c", "x", "2"), ("d", "x", "1")):
        (tmp_path / root).mkdir()
        (tmp_path / root / name).write_text(text)
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import digests; from pathlib import Path\n"
    code += "print([digests.digest_of(Path(root)) for root in 'abcd'])"
    a, b, c, d = json.loads(python("-c", code, cwd=tmp_path).stdout.replace("'", '"'))
    assert a == d
    assert len({a, b, c}) == 3


def test_all_files_of_a_directory_are_evicted_as_far_as_its_file_system_does_that(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); from measure import evict; from pathlib import Path\n"
    for name in ("one", "below/two"):
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(PAGES * mmap.PAGESIZE))
        assert cached_pages(path) == PAGES
    (tmp_path / "control").write_bytes(bytes(PAGES * mmap.PAGESIZE))
    with (tmp_path / "control").open("rb") as control:
        os.fsync(control.fileno())
        os.posix_fadvise(control.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = python("-c", f"{code}evict([Path('files')])", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # A file system in memory keeps all of them.
    left = cached_pages(tmp_path / "control")
    assert [cached_pages(tmp_path / "files" / name) for name in ("one", "below/two")] == [left, left]


def cached_pages(path):
    """Pages of a file in the page cache."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        mapping = mmap.mmap(stream.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
    return sum(page & 1 for page in found)
