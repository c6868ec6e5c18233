"""Killed at any instant, the output is what it was or the result, and the same command finishes the job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LONG = os.environ.get("STREAMMERGE_LONG") == "1"
LAYOUTS = {"sharded": 11, "subject": 23, "one file": 9, "hashes": 17, "overwrite": 11, "buffered": 17}
"""Layouts, and one point in how many is tried; all of them in the long form."""


def campaign(layout: str, folder: Path, *options: object) -> dict[str, Any]:
    """What a campaign found."""
    command = [sys.executable, "-m", "tests.campaigns.kills", layout, str(folder), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_is_killed_before_any_change_to_the_disk_is_finished_by_the_same_command(
    tmp_path: Path, layout: str
) -> None:
    step, twice = (1, 3) if LONG else (LAYOUTS[layout], 1)
    found = campaign(layout, tmp_path, "--step", step, "--twice", twice)
    assert found["wrong"] == [], found["said"]
    assert found["operations"] >= 50
    assert found["points"] >= found["operations"] // step
