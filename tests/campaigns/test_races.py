"""Two runs into one output at the same time: one of them finishes it, whatever the other does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LONG = os.environ.get("STREAMMERGE_LONG") == "1"
TIMES = 200 if LONG else 8


def races(folder: Path, *options: str) -> dict[str, Any]:
    """What a campaign found."""
    command = [sys.executable, "-m", "tests.campaigns.races", str(folder), "--times", str(TIMES), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}


@pytest.mark.parametrize("options", [(), ("--without-locks",)], ids=["locks", "no locks"])
def test_two_runs_at_the_same_time_give_the_right_result_or_a_refusal(tmp_path: Path, options: tuple[str, ...]) -> None:
    found = races(tmp_path, *options)
    assert found["wrong"] == [], found["said"]
    assert sum(found["ended"].values()) == TIMES
    if not options:
        # Both succeed where the second begins when the first has finished: it is told that all is done.
        assert set(found["ended"]) <= {"0 5", "0 0"}
