"""Whatever is done to a finished output, a verification finds it and names the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_every_flipped_bit_and_every_missing_extra_swapped_or_cut_file_is_found(tmp_path: Path) -> None:
    flips = 1000 if os.environ.get("STREAMMERGE_LONG") == "1" else 150
    command = [sys.executable, "-m", "tests.campaigns.bit_flips", str(tmp_path), "--flips", str(flips)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    assert found["points"] >= flips + 130
    tried = found["tried"]
    assert sum(count for kind, count in tried.items() if kind.startswith("flip in ")) == flips
    kinds = {"flip in weights", "flip in header", "flip in config.json", "flip in streammerge.json", "missing", "extra"}
    assert kinds | {"swapped", "renamed", "shorter", "longer", "emptied"} <= tried.keys()
