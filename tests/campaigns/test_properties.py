"""Whatever runs, kills, damage and other merges come to one output: a loader sees nothing, or a whole result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LONG = os.environ.get("STREAMMERGE_LONG") == "1"


def test_any_sequence_of_kills_damage_and_other_merges_leaves_nothing_or_a_whole_result(tmp_path: Path) -> None:
    runs, steps = (200, 50) if LONG else (4, 10)
    command = [sys.executable, "-m", "tests.campaigns.properties", str(tmp_path)]
    command += ["--pairs", "0", "--runs", str(runs), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [], done.stderr
    assert found["points"] >= 4 * runs
    assert found["steps"]["killed"] >= 1
    assert found["steps"]["refused"] >= 1
