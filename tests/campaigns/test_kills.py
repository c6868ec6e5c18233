"""Killed at any instant, the output is what it was or the result, and the same command finishes the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEPS = {"sharded": 31, "subject": 61, "overwrite": 31, "foreign": 41, "hub cache": 61, "hard links": 61}
"""Layouts, and one point in how many is tried here; `scripts/torture` tries more of them, on all layouts."""


def found_by(module: str, folder: Path, *options: object) -> dict[str, Any]:
    """What a campaign found, and what it said beside."""
    command = [sys.executable, "-m", f"tests.campaigns.{module}", str(folder), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}


@pytest.mark.parametrize("layout", STEPS)
def test_a_run_that_is_killed_before_any_change_to_the_disk_is_finished_by_the_same_command(
    tmp_path: Path, layout: str
) -> None:
    found = found_by("kills", tmp_path, "--only", layout, "--step", STEPS[layout], "--twice", 1)
    assert found["wrong"] == [], found["said"]
    assert found["layouts"][layout] >= 50
    assert found["points"] > found["layouts"][layout] // STEPS[layout]
    assert found["pairs"] >= 1
