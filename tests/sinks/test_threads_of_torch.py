"""A merge leaves torch with as many threads as it had, whoever loaded it. Processes of their own: the number is one for
the whole process, and so is who loads torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.refusals.making import inputs_at

ROOT = Path(__file__).parents[2]
MERGES = """
import itertools, json, sys, threading
import torch
import streammerge
from streammerge.compute.worker import TileWorker
from streammerge.core import io
base, adapter, root = sys.argv[1:]
found, within, number = {}, set(), itertools.count()
fill = TileWorker.fill
def noting(*arguments):
    within.add(torch.get_num_threads())
    fill(*arguments)
TileWorker.fill = noting
def merge():
    out = f"{root}/{next(number)}"
    streammerge.merge(base, adapter, out, workers=2)
    return out
def in_a_thread():
    thread = threading.Thread(target=merge)
    thread.start()
    thread.join()
def failing():
    real, io.write_at = io.write_at, lambda *arguments, **named: 1 / 0
    try:
        merge()
    except ZeroDivisionError:
        found["failed"] = True
    finally:
        io.write_at = real
before = torch.get_num_threads()
merge()
found["unset"] = [before, torch.get_num_threads()]
for count in (1, 2, 3):
    torch.set_num_threads(count)
    merge()
    found[f"set to {count}"] = [count, torch.get_num_threads()]
for name, work in {"in a thread": in_a_thread, "failing": failing,
                   "verified": lambda: streammerge.verify(merge(), full=True)}.items():
    torch.set_num_threads(3)
    work()
    found[name] = [3, torch.get_num_threads()]
print(json.dumps([found, sorted(within)]))
"""
LOADED_BY_A_MERGE = """
import json, sys
import streammerge
from streammerge.compute import loading
base, adapter, root = sys.argv[1:]
assert "torch" not in sys.modules
streammerge.merge(base, adapter, f"{root}/out", workers=2)
import torch
print(json.dumps([loading._loading.name, torch.get_num_threads()]))
"""
DEFAULT = """
import json, torch
print(json.dumps(torch.get_num_threads()))
"""


def run(code: str, arguments: Sequence[Path] = ()) -> Any:
    """What a Python process prints, which chooses its number of threads itself."""
    given = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**given, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_number_of_threads_is_what_it_was_and_one_within(tmp_path: Path) -> None:
    found, within = run(MERGES, [*inputs_at(tmp_path), tmp_path])
    assert found.pop("failed")
    assert found.keys() == {"unset", "set to 1", "set to 2", "set to 3", "in a thread", "failing", "verified"}
    for case, (before, after) in found.items():
        assert after == before, case
    assert within == [1]


def test_torch_that_a_merge_loads_has_the_number_it_has_by_itself(tmp_path: Path) -> None:
    loader, count = run(LOADED_BY_A_MERGE, [*inputs_at(tmp_path), tmp_path])
    assert loader == "streammerge-torch"
    assert count == run(DEFAULT)
