"""The command line as a process of its own: what it imports, how it is killed, what it does when its reader has gone
away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.refusals.making import (
    MARKER,
    STAGING,
    as_torch,
    assert_nothing_loadable,
    base_tensors,
    inputs_at,
    make_base,
    merged,
    tree_digest,
)

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
HEAVY = ("torch", "transformers", "peft", "accelerate")

IMPORTS = """
import contextlib, io, json, sys
import streammerge
found = [["import", 0, [name for name in (*HEAVY, "numpy") if name in sys.modules]]]
from streammerge.cli import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    found.append([words[0], code, [name for name in HEAVY if name in sys.modules]])
print(json.dumps(found))
""".replace("HEAVY", repr(HEAVY))

SLOW = """
import sys, time
from streammerge.core import io
write = io.write_at
def slowly(*arguments, **named):
    write(*arguments, **named)
    time.sleep(0.2)
io.write_at = slowly
from streammerge.cli import main
sys.exit(main(sys.argv[1:]))
"""


def imported(*commands: list[object]) -> list[list[object]]:
    """Commands of one process in order: what each one is, how it ended, and what was in sys.modules after it."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, words], capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    found: list[list[object]] = json.loads(done.stdout)
    return found


def test_only_commands_that_compute_import_torch_and_none_imports_a_model_library(tmp_path: Path) -> None:
    import torch

    base, adapter = inputs_at(tmp_path)
    pickled = make_base(tmp_path / "pickled", shards=1)
    torch.save({name: as_torch(tensor) for name, tensor in base_tensors().items()}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    out = tmp_path / "out"
    found = imported(
        ["run", "--help"],
        ["plan", base, adapter, "-o", out],
        ["inspect", adapter, "--base", base],
        ["verify", tmp_path / "nothing"],
        ["plan", pickled, adapter],
        ["run", base, adapter, "-o", out],
    )
    assert found == [
        ["import", 0, []],
        ["run", 0, []],
        ["plan", 0, []],
        ["inspect", 0, []],
        ["verify", 5, []],
        ["plan", 0, ["torch"]],
        ["run", 0, ["torch"]],
    ]
    # A result that is already complete needs no arithmetic.
    assert imported(["run", base, adapter, "-o", out]) == [["import", 0, []], ["run", 0, []]]


def started(base: Path, adapter: Path, out: Path) -> subprocess.Popen[str]:
    """A run that writes slowly, once it has begun to write."""
    command = [sys.executable, "-c", SLOW, "run", str(base), str(adapter), "-o", str(out), "-j", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not list((out / STAGING).glob("*/*.part")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run does not begin to write"
        time.sleep(0.01)
    return process


def test_a_run_that_is_killed_leaves_nothing_loadable_and_the_same_command_finishes_it(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    before = tree_digest(base)
    process = started(base, adapter, tmp_path / "out")
    process.kill()
    process.communicate()
    assert_nothing_loadable(tmp_path / "out")
    assert list((tmp_path / "out" / STAGING).glob("*/run.json"))
    merged(base, adapter, tmp_path / "out")
    merged(base, adapter, tmp_path / "healthy")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "healthy")
    assert tree_digest(base) == before
    assert (tmp_path / "out" / MARKER).exists()


def test_the_module_runs_as_a_command_and_refuses_with_its_code(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path, r=7)
    command = [sys.executable, "-m", "streammerge", "run", str(base), str(adapter), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 4
    assert done.stdout == ""
    assert done.stderr.startswith("error: the factors of ")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "streammerge", "plan", str(base), str(adapter), "-v"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert done.stderr == ""
