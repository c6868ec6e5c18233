"""A log on a full disk and a reader that has gone end nothing that is under way, and exit code 0 means done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.refusals.making import MARKER, inputs_at

FULL = Path("/dev/full")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def command(root: Path, *options: str) -> list[str]:
    """A run of the real command into `root`/out."""
    base, adapter = inputs_at(root)
    return [sys.executable, "-m", "streammerge", "run", str(base), str(adapter), "-o", str(root / "out"), *options]


def code_without_reader(words: list[str], stream: str) -> int:
    """The exit code of a command whose stdout or stderr is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
    try:
        return subprocess.run(words, env=ENVIRONMENT, check=False, **streams).returncode
    finally:
        os.close(writer)


@pytest.mark.parametrize(("stream", "options"), [("stderr", ()), ("stdout", ("--json",))], ids=["log", "json"])
def test_a_run_whose_reader_has_gone_is_finished_all_the_same(
    tmp_path: Path, stream: str, options: tuple[str, ...]
) -> None:
    assert code_without_reader(command(tmp_path, *options), stream) == 0
    assert (tmp_path / "out" / MARKER).exists()


@needs_full
def test_a_run_whose_log_is_on_a_full_disk_is_finished_all_the_same(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(command(tmp_path), env=ENVIRONMENT, stderr=full, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert done.stdout.decode().strip() == str(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).exists()


@needs_full
def test_a_refusal_that_cannot_be_printed_keeps_its_exit_code(tmp_path: Path) -> None:
    words = command(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with FULL.open("w") as full:
        assert subprocess.run(words, env=ENVIRONMENT, stderr=full, check=False).returncode == 3


@needs_full
def test_results_that_cannot_be_printed_are_a_failure_to_write(tmp_path: Path) -> None:
    words = [*command(tmp_path, "--json", "--dry-run")]
    with FULL.open("w") as full:
        done = subprocess.run(words, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 7
    assert done.stderr == "error: cannot write to `standard output`: No space left on device\n"


def test_a_plan_whose_reader_has_seen_enough_is_no_failure(tmp_path: Path) -> None:
    assert code_without_reader(command(tmp_path, "--dry-run"), "stdout") == 0
