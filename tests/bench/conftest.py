"""A base that the tests of benchmarks share."""

import pytest

from tests.bench.processes import bench


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with a base of 5 MB in several shards, and its adapter."""
    root = tmp_path_factory.mktemp("bench")
    bench("make_base.py", root / "made", "--size", "5MB", "--shard-size", "1MB", "--rank", "4", cwd=root)
    return root / "made"
