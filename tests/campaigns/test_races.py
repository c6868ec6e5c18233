"""Two runs into one output at the same time, of one merge or of two different ones: one finishes, or neither does."""

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
    assert sum(found["ended"].values()) == found["points"] == TIMES
    if not options:
        # With locks somebody always finishes; without, two that begin at once may both make way.
        assert not [end for end in found["ended"] if end.endswith(": 5 5")]
    assert all(said.startswith("OutputExistsError: ") for said in found["told"])
