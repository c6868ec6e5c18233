"""A system that gives a process no more threads, or no more memory: told as that, nothing hangs, nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streammerge.core.errors import MachineError
from streammerge.core.resources import ThreadPool, aligned_buffer
from tests.cli.test_processes import ENVIRONMENT
from tests.refusals.making import STAGING, assert_nothing_loadable, inputs_at, merged, tree_digest

UNTIL_IT_WORKS = """
import contextlib, io, json, mmap, sys, threading, torch
from streammerge.cli import main
from streammerge.core import resources

class Limit:
    count = at = 0

    def reached(self):
        self.count += 1
        return self.count >= self.at

limit, start, memory = Limit(), threading._start_new_thread, mmap.mmap

def started(*arguments, **options):
    if limit.reached():
        raise RuntimeError("can't start new thread")
    return start(*arguments, **options)

def mapped(fd, size, **options):
    if fd == -1 and size > 4096 and limit.reached():
        raise OSError(12, "Cannot allocate memory")
    return memory(fd, size, **options)

if sys.argv[1] == "threads":
    threading._start_new_thread = started
else:
    mmap.mmap = mapped
ends = []
while not ends or ends[-1][0]:
    limit.count, limit.at = 0, len(ends) + 1
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["run", *sys.argv[2:], "-j", "2", "--sha256"])
    ends.append((code, said.getvalue()))
print(json.dumps(ends))
"""
"""Runs the command with a limit of nothing, of one, of two, and so on until it succeeds."""


@pytest.mark.parametrize(("what", "words"), [("threads", "no more threads"), ("memory", "of memory: [Errno 12]")])
def test_a_limit_that_is_met_anywhere_is_told_and_the_next_run_goes_on(tmp_path: Path, what: str, words: str) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy", "--sha256")
    command = [sys.executable, "-c", UNTIL_IT_WORKS, what, str(base), str(adapter), "-o", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert ran.returncode == 0, ran.stderr
    *failed, (code, _) = json.loads(ran.stdout)
    assert code == 0
    assert len(failed) >= 4
    for code, said in failed:
        assert code == MachineError.exit_code, said
        assert "error: the system gives this process no " in said
        assert words in said
        assert "`--jobs 1`" in said
    assert not (tmp_path / "out" / STAGING).exists()
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "healthy")


@pytest.mark.parametrize("what", ["threads", "memory"])
def test_after_a_limit_nothing_loadable_is_there(tmp_path: Path, what: str) -> None:
    base, adapter = inputs_at(tmp_path)
    once = UNTIL_IT_WORKS.replace("while not ends or ends[-1][0]:", "for _ in range(4):")
    command = [sys.executable, "-c", once, what, str(base), str(adapter), "-o", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert {code for code, _ in json.loads(ran.stdout)} == {MachineError.exit_code}, ran.stderr
    assert_nothing_loadable(tmp_path / "out")


def test_a_pool_has_all_its_threads_before_there_is_work() -> None:
    import threading

    before = threading.active_count()
    with ThreadPool(3, "test") as pool:
        assert threading.active_count() == before + 3
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
    assert threading.active_count() == before


def test_memory_that_there_is_not_is_a_machine_error() -> None:
    with pytest.raises(MachineError, match="no 4611686 TB of memory: .*Cannot allocate memory"):
        aligned_buffer(2**62)
