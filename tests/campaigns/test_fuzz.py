"""The fuzzer runs through, and finds nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="the fuzzer takes atheris, which is not installed"
)
CASES = 4_000


def test_some_thousand_fuzzed_cases_pass_or_are_refused_and_a_finished_part_is_not_repeated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.campaigns.fuzz", str(tmp_path), "--cases", str(CASES)]
    command += ["--size", "300000", "--step", "20"]
    for call in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["wrong"] == []
        assert found["points"] == found["cases"] == CASES
        assert {one["parser"]: one["accepted"] > 0 for one in found["parsers"]} == dict.fromkeys(
            ("header", "index", "config", "keys"), True
        )
        if call == 0:
            times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    assert len(times) == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")} == times
