"""The output's bytes depend on the inputs alone: not on workers, memory, or how the base is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from tests.oracle.test_cases import BY_NAME
from tests.oracle.workbench import Workbench

WAYS = [
    {"workers": workers, "memory": memory, "read": read}
    for workers in (1, 2, 3)
    for memory in ("40MB", "128MB")
    for read in ("mmap", "pread")
]
# Tables and matrices of several tiles, formulas of every locality, and more tensors than workers.
NAMES = (
    "linear-many-tiles",
    "high-rank",
    "dora-many-tiles",
    "dora-embedding-many-tiles",
    "dora-conv1d",
    "tied-embedding-dora",
    "tokens-of-both",
    "experts-gpt-oss",
    "pissa",
)


def digests(root: Path) -> dict[str, str]:
    """Of every file of an output but the record of where its inputs were."""
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != ".streammerge-inputs.json"]
    return {str(path.relative_to(root)): xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}@bytes") for name in NAMES])
def test_bytes_do_not_depend_on_workers_memory_or_reading(bench: Workbench, name: str):
    outputs = [bench.output(BY_NAME[name], "bfloat16", "sharded", **way) for way in WAYS]
    first, *others = (digests(output) for output in outputs)
    assert "streammerge.json" in first
    assert all(other == first for other in others)
