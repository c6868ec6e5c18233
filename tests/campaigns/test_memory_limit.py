"""A run needs less memory than a shard has; one that the kernel kills for memory is finished by the same command."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.running import LONG, found_by


def test_a_shard_larger_than_the_memory_is_merged_and_a_run_killed_for_memory_is_finished(tmp_path: Path) -> None:
    sizes = ("--size", "1GB", "--limit", "640MB", "--kills", 5) if LONG else ("--size", "380MB", "--limit", "360MB")
    found = found_by("memory_limit", tmp_path, *sizes)
    assert found["wrong"] == [], found["said"]
    assert found["shard"] > found["limit"] >= found["charged"] > 0
    assert found["points"] >= 3
