"""File systems that fail: the documented exit code, path and operation named, and the same bytes in the end."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.running import LONG, found_by


def test_a_run_between_file_systems_that_fail_says_so_and_is_finished_by_the_same_command(tmp_path: Path) -> None:
    points = 300 if LONG else 6
    found = found_by("fuse_faults", tmp_path, "--points", points)
    assert found["wrong"] == [], found["said"]
    assert found["points"] >= (250 if LONG else points)
    assert {"exit code 3", "exit code 7"} <= found["ended"].keys()
