"""The real command, killed at any system call that changes its output, is finished by the same command."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.running import LONG, found_by


def test_the_real_command_killed_by_strace_is_finished_by_the_same_command(tmp_path: Path) -> None:
    points = 120 if LONG else 2
    found = found_by("syscalls", tmp_path, "--points", points)
    assert found["wrong"] == [], found["said"]
    assert found["points"] >= (100 if LONG else points)
    assert found["calls"]["new"] >= 40
