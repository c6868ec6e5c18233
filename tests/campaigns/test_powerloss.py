"""When the power fails, a disk holds what was there before or the result, and what had ended well stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.running import LONG, found_by


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_run_that_loses_its_disk_is_finished_by_the_same_command_and_without_syncs_it_would_not_be(
    tmp_path: Path, kind: str
) -> None:
    points, control = (300, 60) if LONG else (4, 4)
    found = found_by("powerloss", tmp_path, "--fs", kind, "--points", points, "--control", control)
    assert found["wrong"] == [], found["said"]
    assert found["points"] == points
    assert found["after the end"] >= 1
    assert found["without fsync"]["wrong"] >= 1
