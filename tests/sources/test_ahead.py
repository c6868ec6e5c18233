"""Reading ahead: in the order of the files, no further than the window, and no trouble to anybody."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import streammerge
from streammerge.core import machine, pages
from streammerge.core.errors import InputMissingError
from streammerge.core.tensors import TensorInfo
from streammerge.sources import ahead
from streammerge.sources.ahead import ReadAhead
from streammerge.sources.files import TensorFiles
from tests.refusals.making import inputs_at

STEP = 1000
SIZES = {"a": 10_500, "b": 3_000, "c": 0, "d": 7_001}
TOTAL = sum(SIZES.values())


class Cached:
    """What was asked for, as ranges of one row of all files, and a way to wait for so many bytes of it."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.ranges: list[tuple[int, int]] = []
        self.steps: list[tuple[str, int, int]] = []
        self.ahead: list[int] = []
        self.changed = threading.Condition()
        self.real = pages.cache

    def __call__(self, fd: int, path: str, offset: int, size: int) -> int:
        names = list(SIZES)
        name = os.path.basename(path)
        start = sum(SIZES[before] for before in names[: names.index(name)]) + offset
        count = self.real(fd, path, offset, size)
        with self.changed:
            self.ranges.append((start, start + count))
            self.steps.append((name, offset, size))
            self.ahead.append(start + count - self.files.used)
            self.changed.notify_all()
        return count

    @property
    def reached(self) -> int:
        return max((end for _, end in self.ranges), default=0)

    def wait_for(self, position: int) -> None:
        """Return when everything up to `position` was asked for."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.reached >= position, 30)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorFiles:
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setattr(ahead, "STEP", STEP)
    monkeypatch.setattr(ahead, "LEAST", 2 * STEP)
    return TensorFiles(tmp_path, "mmap")


@pytest.fixture
def cached(files: TensorFiles, monkeypatch: pytest.MonkeyPatch) -> Cached:
    found = Cached(files)
    monkeypatch.setattr(pages, "cache", found)
    return found


def use(files: TensorFiles, name: str, start: int, end: int) -> None:
    """Read bytes of a file, as a merge does."""
    files.read(TensorInfo("t", "U8", (SIZES[name],), name, 0, SIZES[name]), start, end)


def is_running() -> bool:
    return any(thread.name == "streammerge-ahead" for thread in threading.enumerate())


def test_with_room_for_all_every_byte_is_asked_for_once_and_in_order(files: TensorFiles, cached: Cached) -> None:
    with ReadAhead(files, list(SIZES), window=10 * TOTAL):
        cached.wait_for(TOTAL)
    assert cached.ranges[0] == (0, STEP)
    assert [start for start, _ in cached.ranges[1:]] == [end for _, end in cached.ranges[:-1]]
    assert cached.ranges[-1][1] == TOTAL
    assert not is_running()


def test_it_stays_within_the_window_until_others_follow(files: TensorFiles, cached: Cached) -> None:
    window = 4 * STEP
    with ReadAhead(files, list(SIZES), window):
        for used in range(0, SIZES["a"], 700):
            # A step is begun within the window, and ends at most a step beyond it.
            cached.wait_for(min(files.used + window, TOTAL))
            use(files, "a", used, min(used + 700, SIZES["a"]))
        assert files.used == SIZES["a"]
        cached.wait_for(SIZES["a"] + window)
    assert max(cached.ahead) <= window + STEP
    assert [name for name, _, _ in cached.steps] == sorted(name for name, _, _ in cached.steps)


def test_it_waits_where_nothing_is_used(files: TensorFiles, cached: Cached) -> None:
    with ReadAhead(files, list(SIZES), window=3 * STEP) as reader:
        cached.wait_for(3 * STEP)
        reader._stop.wait(0.05)
        assert cached.reached <= 4 * STEP
        assert is_running()
    assert not is_running()
    assert cached.reached <= 4 * STEP


def test_what_others_have_passed_is_left_out(files: TensorFiles, cached: Cached) -> None:
    with ReadAhead(files, list(SIZES), window=2 * STEP):
        cached.wait_for(3 * STEP)
        use(files, "a", 0, SIZES["a"])
        cached.wait_for(SIZES["a"] + 2 * STEP)
    assert not [start for start, _ in cached.ranges if 4 * STEP <= start < SIZES["a"]]
    assert SIZES["a"] in [start for start, _ in cached.ranges]


def test_leaving_ends_it_between_two_steps(files: TensorFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, steps = threading.Event(), threading.Event(), []

    def slow(fd: int, path: str, offset: int, size: int) -> int:
        steps.append(path)
        begun.set()
        assert go.wait(30)
        return size

    monkeypatch.setattr(pages, "cache", slow)
    with ReadAhead(files, list(SIZES), window=10 * TOTAL) as reader:
        assert begun.wait(30)
        reader._stop.set()
        go.set()
    assert len(steps) == 1
    assert not is_running()


def test_an_exception_within_ends_it_too(files: TensorFiles, cached: Cached) -> None:
    with pytest.raises(KeyError), ReadAhead(files, list(SIZES), window=2 * STEP):
        raise KeyError
    assert not is_running()


@pytest.mark.parametrize("mode", ["pread", "direct"])
def test_files_that_are_not_mapped_are_left_alone(
    tmp_path: Path, files: TensorFiles, cached: Cached, mode: str
) -> None:
    with ReadAhead(TensorFiles(tmp_path, mode), list(SIZES), window=10 * TOTAL):
        assert not is_running()
    assert cached.ranges == []


@pytest.mark.parametrize(("room", "runs"), [(0, False), (2 * STEP - 1, False), (2 * STEP, True)])
def test_little_room_is_left_to_others(
    files: TensorFiles, cached: Cached, monkeypatch: pytest.MonkeyPatch, room: int, runs: bool
) -> None:
    monkeypatch.setattr(machine, "room_for_pages", lambda: room)
    with ReadAhead(files, list(SIZES)):
        assert is_running() == runs
    assert not is_running()


def test_the_window_is_bounded_however_much_room_there_is(files: TensorFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "room_for_pages", lambda: 2**50)
    assert ReadAhead(files, [])._window == ahead.WINDOW


def test_a_file_that_is_gone_ends_it_in_silence(tmp_path: Path, files: TensorFiles, cached: Cached) -> None:
    (tmp_path / "b").unlink()
    with ReadAhead(files, list(SIZES), window=10 * TOTAL) as reader:
        reader._thread.join(30)
        assert not is_running()
    assert {name for name, _, _ in cached.steps} == {"a"}


def test_a_file_that_ends_early_is_left_for_the_next(files: TensorFiles, cached: Cached) -> None:
    real = cached.real
    cached.real = lambda fd, path, offset, size: real(fd, path, offset, size if offset or path[-1] != "a" else 0)
    with ReadAhead(files, list(SIZES), window=10 * TOTAL) as reader:
        reader._thread.join(30)
        assert not is_running()
    assert {name for name, _, _ in cached.steps} == {"a", "b", "d"}


def test_the_merge_itself_reports_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputMissingError, match="model-00002-of-00002"):
        streammerge.merge(base, adapter, tmp_path / "out")
    assert not is_running()


def test_a_merge_is_read_ahead_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    monkeypatch.setattr(machine, "room_for_pages", lambda: 2**30)
    seen: list[Sequence[str]] = []
    entered: Callable[[ReadAhead], ReadAhead] = ReadAhead.__enter__

    def noting(reader: ReadAhead) -> ReadAhead:
        seen.append(reader._names)
        return entered(reader)

    monkeypatch.setattr(ReadAhead, "__enter__", noting)
    streammerge.merge(base, adapter, tmp_path / "out")
    assert seen == [sorted(path.name for path in base.glob("*.safetensors"))]
    assert not is_running()


def test_caching_brings_pages_into_memory_and_stops_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10_000))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert pages.cache(fd, str(path), 0, 4096) == 4096
        assert pages.cache(fd, str(path), 9_000, 4096) == 1_000
        assert pages.cache(fd, str(path), 10_000, 4096) == 0
    finally:
        os.close(fd)
