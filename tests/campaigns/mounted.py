"""The command line of a campaign on file systems of its own: a folder, how many points, and a seed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaigns.kills import prepared
from tests.campaigns.mounts import Refused, keep_mounts_private
from tests.campaigns.watching import warm_up


def run(name: str, campaign: Callable[[Path, int, int], dict[str, Any]], *, points: int) -> None:
    """Run a campaign with what the command line says, and print what it found, or why it cannot be run here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int, default=points)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.monotonic()
    prepared()
    warm_up(arguments.folder / "warm")
    found: dict[str, Any] = {"campaign": name, "points": 0, "wrong": [], "kinds": []}
    try:
        keep_mounts_private()
        found |= campaign(arguments.folder, arguments.points, arguments.seed)
    except Refused as refused:
        found["skipped"] = str(refused)
    sys.stdout.write(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}))
