"""A disk that does not take everything ends a run with the documented exit code, and with room it is finished."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.running import LONG, found_by


def test_a_run_that_meets_a_full_disk_or_a_limit_says_so_and_is_finished_by_the_same_command(tmp_path: Path) -> None:
    points = 100 if LONG else 4
    found = found_by("full_disk", tmp_path, "--points", points)
    assert found["wrong"] == [], found["said"]
    assert found["points"] >= points + 10
    assert len(found["kinds"]) >= 10
    assert found["ended"]["exit code 7"] >= 8
