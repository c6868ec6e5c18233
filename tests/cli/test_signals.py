"""How commands end on a signal: with the code that shells expect, in a state that the same command goes on from, and
only where signals are theirs to handle."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import streammerge
from streammerge import integrity
from streammerge.cli import signals
from streammerge.cli.signals import HANDLED, interruptible
from streammerge.core import pages
from streammerge.core.errors import Interrupted, StreamMergeError, VerificationError
from streammerge.core.text import size_text
from streammerge.sinks import recovery
from streammerge.sinks.directory import OutputDirectory
from tests.cli.test_processes import ENVIRONMENT, SLOW, started
from tests.refusals.making import MARKER, STAGING, assert_nothing_loadable, call, inputs_at, merged, tree_digest

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
ENDLESS = """
import hashlib, sys, threading, time
from streammerge.cli import commands, main, signals
signals.GRACE = float(sys.argv[1])
def say():
    print("begun", file=sys.stderr, flush=True)
def stuck():
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 2**31 - 1)  # minutes in which Python runs no handler
def tireless():
    while True:
        try:
            time.sleep(60)
        except Exception:
            continue
def endless(*_):
    threading.Timer(0.3, say).start()  # when the main thread is in it
    HOW()
commands.status = endless
sys.exit(main(["status", "x"]))
"""
STUCK, TIRELESS = ENDLESS.replace("HOW", "stuck"), ENDLESS.replace("HOW", "tireless")


def ignore(error: Interrupted) -> None:
    """Say nothing."""


def begun(*command: str) -> subprocess.Popen[str]:
    """A process that has said that it began."""
    process = subprocess.Popen(
        [sys.executable, "-c", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stderr
    assert process.stderr.readline() == "begun\n"
    return process


def ended(process: subprocess.Popen[str]) -> str:
    """What a process says on standard error until it ends."""
    with process:
        return process.communicate(timeout=60)[1]


def wait_for(process: subprocess.Popen[str], seen: Callable[[], bool]) -> None:
    """Return when `seen` holds, which it must while the process lasts."""
    deadline = time.monotonic() + 60
    while not seen():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.01)


# --- a run ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("signum", HANDLED, ids=lambda signum: signum.name)
def test_a_signal_ends_a_run_with_its_code_and_leaves_nothing_loadable(tmp_path: Path, signum: signal.Signals) -> None:
    base, adapter = inputs_at(tmp_path)
    out = tmp_path / "out"
    process = started(base, adapter, out)
    process.send_signal(signum)
    said, err = process.communicate(timeout=60)
    assert process.returncode == CODES[signum], err
    assert said == ""
    assert f"error: stopped by {signum.name}; nothing is lost: run the same command again" in err
    assert "Traceback" not in err
    assert_nothing_loadable(out)
    assert list(out.glob("*.safetensors*")) == []
    merged(base, adapter, out)


def left_before_publishing(base: Path, adapter: Path, out: Path, patch: pytest.MonkeyPatch) -> None:
    """What a run leaves that ended when everything was staged."""
    with patch.context() as inner:
        inner.setattr(OutputDirectory, "publish", lambda *_: 1 / 0)
        assert call("run", base, adapter, "-o", out).code == 1


def test_a_signal_while_a_run_reads_again_what_is_there_stops_the_reading_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy")
    left_before_publishing(base, adapter, tmp_path / "out", monkeypatch)
    before = tree_digest(tmp_path / "out")
    (begun_in,) = (tmp_path / "out" / STAGING).glob("*.*")
    stopped = []

    def pieces(reader: recovery._Reader, *_: object) -> Iterator[bytearray]:
        time.sleep(0.2)  # until the main thread waits for what is read
        os.kill(os.getpid(), signal.SIGTERM)
        stopped.append(reader._stop.wait(60))
        yield bytearray()

    with monkeypatch.context() as inner:
        inner.setattr(recovery._Reader, "_pieces", pieces)
        outcome = call("run", base, adapter, "-o", tmp_path / "out", "-j", 1)
    assert outcome.code == 143, outcome.err
    assert stopped == [True]
    (taken_over,) = (tmp_path / "out" / STAGING).glob("*.*")
    taken_over.rename(begun_in)
    assert tree_digest(tmp_path / "out") == before
    merged(base, adapter, tmp_path / "out")
    assert tree_digest(tmp_path / "out") == tree_digest(tmp_path / "healthy")


def test_a_run_that_goes_on_says_that_it_reads_again_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    left_before_publishing(base, adapter, tmp_path / "out", monkeypatch)
    size = sum(path.stat().st_size for path in (tmp_path / "out" / STAGING).glob("*/*.safetensors"))
    dropped = []
    real = pages.drop

    def drop(fd: int, offset: int, count: int) -> None:
        dropped.append(count)
        real(fd, offset, count)

    monkeypatch.setattr(recovery.pages, "drop", drop)
    lines = merged(base, adapter, tmp_path / "out").err.splitlines()
    assert lines[0] == f"resuming: {size_text(size)} were written before, and are read again first"
    assert lines[1] == f"resuming: {size_text(size)} are there already, 2 blocks read again and found good"
    assert sum(dropped) == size, "what was read again stays in the page cache"


def test_what_reads_again_is_an_event_and_a_line_of_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    for out in ("one", "two"):
        left_before_publishing(base, adapter, tmp_path / out, monkeypatch)
    lines = [json.loads(line) for line in merged(base, adapter, tmp_path / "one", "--json").out.splitlines()]
    assert [line["type"] for line in lines[:3]] == ["reread", "start", "resume"]
    assert lines[0]["bytes"] == lines[1]["bytes"] == lines[2]["bytes"]
    events: list[streammerge.Event] = []
    streammerge.merge(base, adapter, tmp_path / "two", progress=events.append)
    begins = [event.kind for event in events].index("start")
    assert events[0].kind == "reread"
    assert sum(event.bytes for event in events[1:begins]) == events[0].bytes == lines[0]["bytes"]


def test_a_signal_while_an_output_is_verified_is_no_failure_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    for name in ("read_header", "check_index", "block_digest"):
        with monkeypatch.context() as inner:
            inner.setattr(integrity, name, lambda *_: signal.raise_signal(signal.SIGHUP))
            outcome = call("verify", tmp_path / "out")
        assert outcome.code == 129, name
        assert "failed verification" not in outcome.err


def test_under_nohup_a_hangup_changes_nothing(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    out = tmp_path / "out"
    command = ["nohup", sys.executable, "-c", SLOW, "run", str(base), str(adapter), "-o", str(out), "-j", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    wait_for(process, lambda: bool(list((out / STAGING).glob("*/*.part"))))
    process.send_signal(signal.SIGHUP)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert said == f"{out}\n"
    assert (out / MARKER).exists()


# --- handlers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("signum", HANDLED, ids=lambda signum: signum.name)
def test_the_first_signal_is_an_exception_another_sigint_is_not_waited_for_and_handlers_are_put_back(
    signum: signal.Signals,
) -> None:
    before = [signal.getsignal(number) for number in HANDLED]
    with interruptible(ignore):
        with pytest.raises(Interrupted) as caught:
            signal.raise_signal(signum)
        after = [signal.getsignal(number) for number in HANDLED]
    assert after == [signal.SIG_DFL, signals._nothing, signals._nothing]
    assert caught.value.exit_code == 128 + signum
    assert [signal.getsignal(number) for number in HANDLED] == before
    assert "streammerge-signals" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("signum", HANDLED, ids=lambda signum: signum.name)
def test_what_was_ignored_stays_ignored(signum: signal.Signals) -> None:
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with interruptible(ignore):
            signal.raise_signal(signum)
            others = [signal.getsignal(number) for number in HANDLED if number != signum]
        assert signal.getsignal(signum) is signal.SIG_IGN
        assert signal.SIG_IGN not in others
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", HANDLED, ids=lambda signum: signum.name)
def test_a_signal_that_python_swallows_is_raised_once_more(signum: signal.Signals) -> None:
    """As it is in a weakref's callback, of which the import system has many."""

    class Dropped:
        pass

    def drop() -> None:
        dropped = Dropped()
        found.append(weakref.ref(dropped, lambda _: signal.raise_signal(signum)))

    found: list[weakref.ref[Dropped]] = []
    before = sys.unraisablehook

    def command() -> None:
        with interruptible(ignore):
            drop()
            time.sleep(60)

    with pytest.raises(Interrupted) as caught:
        command()
    assert caught.value.signum == signum
    assert sys.unraisablehook is before


def test_whatever_comes_of_a_signal_on_the_way_out_it_is_the_signal_that_ended_it() -> None:
    def misled() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except StreamMergeError:
            raise VerificationError("out", ("it was interrupted",)) from None

    with pytest.raises(Interrupted) as caught, interruptible(ignore):
        misled()
    assert caught.value.signum == signal.SIGTERM
    with pytest.raises(VerificationError), interruptible(ignore):
        raise VerificationError("out", ("a bit is wrong",))


@pytest.mark.parametrize("signum", HANDLED, ids=lambda signum: signum.name)
@pytest.mark.parametrize("program", [STUCK, TIRELESS], ids=["stuck", "tireless"])
def test_a_command_that_does_not_come_to_an_end_is_ended(program: str, signum: signal.Signals) -> None:
    process = begun(program, "0.2")
    process.send_signal(signum)
    err = ended(process)
    assert process.returncode == CODES[signum], err
    assert f"error: stopped by {signum.name}; nothing is lost: run the same command again" in err


@pytest.mark.parametrize("program", [STUCK, TIRELESS], ids=["stuck", "tireless"])
def test_sigint_ends_a_command_that_is_ending_at_once_and_other_signals_do_not(program: str) -> None:
    process = begun(program, "1000")
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        process.send_signal(signum)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    err = ended(process)
    # Ended by itself with the code of the first, or by the system as SIGINT does.
    assert process.returncode in (129, 143, -signal.SIGINT), err
    assert "Traceback" not in err


@pytest.mark.parametrize("program", [STUCK, TIRELESS], ids=["stuck", "tireless"])
def test_a_second_sigint_ends_a_command_at_once(program: str) -> None:
    process = begun(program, "1000")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    err = ended(process)
    assert process.returncode in (130, -signal.SIGINT), err
    assert "Traceback" not in err


def test_last_words_that_nobody_reads_keep_no_process_alive() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    os.set_blocking(writing, True)
    program = STUCK.replace("file=sys.stderr", "file=sys.stdout")
    process = subprocess.Popen(
        [sys.executable, "-c", program, "0.1"], stdout=subprocess.PIPE, stderr=writing, text=True, env=ENVIRONMENT
    )
    os.close(writing)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    os.close(reading)
    assert process.returncode == 143


def test_sigint_before_the_command_begins_ends_the_process_without_a_traceback(tmp_path: Path) -> None:
    """As it does while modules are imported: here one of them takes its time."""
    late = 'import sys, time; print("begun", file=sys.stderr, flush=True); time.sleep(60)'
    (tmp_path / "argparse.py").write_text(late)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from streammerge.__main__ import script; script()"
    process = begun(program)
    process.send_signal(signal.SIGINT)
    err = ended(process)
    assert process.returncode == -signal.SIGINT
    assert err == ""


# --- the library ------------------------------------------------------------------------------------------------------
def test_the_library_leaves_signals_to_its_caller_on_the_main_thread_and_on_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)

    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the library touched a signal")

    with monkeypatch.context() as inner:
        for name in ("signal", "set_wakeup_fd", "pthread_sigmask", "setitimer", "siginterrupt"):
            inner.setattr(signal, name, touched)
        streammerge.merge(base, adapter, tmp_path / "here")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(streammerge.merge, base, adapter, tmp_path / "there").result()
            assert pool.submit(streammerge.verify, tmp_path / "there", full=True).result().status == "verified"


def test_on_another_thread_a_command_leaves_signals_alone(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    before = [signal.getsignal(number) for number in HANDLED]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(merged, base, adapter, tmp_path / "out").result()
    assert [signal.getsignal(number) for number in HANDLED] == before
