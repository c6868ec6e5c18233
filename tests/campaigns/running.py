"""A campaign as a process of its own, for the tests: what it found, or a test skipped with the reason it gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

LONG = os.environ.get("STREAMMERGE_LONG") == "1"


def found_by(module: str, *arguments: object) -> dict[str, Any]:
    """What `python -m tests.campaigns.MODULE ARGUMENTS` prints, with what it `said` meanwhile."""
    command = [sys.executable, "-m", f"tests.campaigns.{module}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    return found | {"said": done.stderr}
