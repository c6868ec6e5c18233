"""Where there are no locks, another merge may begin, and end, between any two operations of a run: what is there in the
end is one of the two or nothing, never some files of each."""

from __future__ import annotations

import errno
import fcntl
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.core import io
from streammerge.core.errors import OutputExistsError
from streammerge.sinks.directory import STAGING, OutputDirectory
from streammerge.sinks.run_folder import RunFolder
from tests.campaigns.kills import bytes_of
from tests.refusals.making import BASE_CONFIG, INDEX, MARKER, inputs_at

pytestmark = pytest.mark.out_of_order

OPERATIONS = (
    "create", "open_again", "open_journal", "append", "open_lock", "allocate", "write_at", "sync_file", "rename",
    "sync_dir", "remove", "remove_dir_if_empty", "make_dirs", "make_dirs_of",
)  # fmt: skip


class Rivals:
    """A merge, and another one that can be let in before its n-th operation on the disk."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, **other: Any) -> None:
        self.base, self.adapter = inputs_at(root)
        self.out, self.patch, self.other = root / "out", patch, other
        self.count = self.at = 0
        self.second = ""
        options = {name: value for name, value in other.items() if name != "overwrite"}
        self.results = [self.healthy(root / "first"), self.healthy(root / "second", **options)]
        patch.setattr(fcntl, "flock", self.no_locks)
        for name in OPERATIONS:
            # The order checker knows one run in a process, not two.
            patch.setattr(io, name, self.counted(inspect.unwrap(getattr(io, name))))

    def healthy(self, out: Path, **options: Any) -> dict[str, bytes]:
        """What a merge comes to that nobody disturbs."""
        streammerge.merge(self.base, self.adapter, out, workers=1, **options)
        return bytes_of(out)

    def no_locks(self, *_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                with self.patch.context() as patch:
                    patch.setattr(os, "getpid", lambda: 1)
                    self.second = self.run(**self.other)
            return real(*arguments, **options)

        return counted

    def run(self, **options: Any) -> str:
        """A merge, and how it ended."""
        try:
            streammerge.merge(self.base, self.adapter, self.out, workers=1, **options)
        except OutputExistsError:
            return "refused"
        return "done"

    def let_in(self, at: int) -> tuple[str, str]:
        """Both merges, the second one before the n-th operation of the first; how they ended, which has to be true."""
        self.count, self.at, self.second = 0, at, "not begun"
        first = self.run()
        found = {name: data for name, data in bytes_of(self.out).items() if not name.startswith(f"{STAGING}/")}
        if MARKER in found or BASE_CONFIG in found or INDEX in found:
            assert found in self.results, f"before operation {at}: a mixture: {sorted(found)}"
        done = [result for result, end in zip(self.results, (first, self.second), strict=True) if end == "done"]
        assert not done or found in done, f"before operation {at}: {first}, {self.second}, and not there"
        return first, self.second


OTHERS = {
    "the same": {},
    "other values": {"weights": [0.5]},
    "other files": {"max_shard_size": "3kB"},
    "other values, overwriting": {"weights": [0.5], "overwrite": True},
    "other files, overwriting": {"max_shard_size": "3kB", "overwrite": True},
}


@pytest.mark.parametrize("other", OTHERS)
def test_two_merges_of_which_one_comes_between_any_two_operations_of_the_other_never_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    rivals = Rivals(tmp_path, monkeypatch, **OTHERS[other])
    ends = set()
    at = 1
    while True:
        ends.add(rivals.let_in(at))
        if rivals.second == "not begun":
            break
        rivals.at = 0
        again = rivals.run(overwrite=True)
        assert again == "done"
        assert bytes_of(rivals.out) == rivals.results[0], f"before operation {at}: the next run does not mend it"
        for path in sorted(rivals.out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        rivals.out.rmdir()
        at += 11
    assert at > 50
    assert ("done", "not begun") in ends
    assert {second for _, second in ends} >= {"done"}


def test_of_two_merges_that_begin_at_once_the_one_that_sees_the_other_goes_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = Rivals(tmp_path, monkeypatch, weights=[0.5])
    directory = OutputDirectory(rivals.out)
    real = RunFolder.write_down

    def write_down(self: RunFolder, record: Mapping[str, Any]) -> None:
        with monkeypatch.context() as inner:
            inner.setattr(RunFolder, "write_down", real)
            directory.claim({"fingerprint": "f" * 64, "adapters": []}, ["x"], overwrite=False)
        real(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_down", write_down)
        assert rivals.run() == "refused"
    assert list(directory.runs()) == [directory.run]


@pytest.mark.parametrize("name", [INDEX, BASE_CONFIG, MARKER])
def test_a_run_that_another_one_begins_to_replace_changes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rivals = Rivals(tmp_path, monkeypatch)
    real = RunFolder.put
    before: dict[str, bytes] = {}

    def put(self: RunFolder, file: str, data: bytes, home: Path) -> None:
        if file == name:
            (rivals.out / STAGING / "other").mkdir()
            self.path.rename(rivals.out / STAGING / "other" / self.path.name)
            before.update(bytes_of(rivals.out))
        real(self, file, data, home)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "put", put)
        with pytest.raises(OutputExistsError, match="another run is at work on .* vanished while it was in use"):
            streammerge.merge(rivals.base, rivals.adapter, rivals.out)
    assert MARKER not in before
    assert bytes_of(rivals.out) == before


def test_a_result_that_is_replaced_while_it_is_checked_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = Rivals(tmp_path, monkeypatch)

    def progress(event: streammerge.Event) -> None:
        if event.kind == "verify":
            streammerge.merge(rivals.base, rivals.adapter, rivals.out, max_shard_size="3kB", overwrite=True)

    with pytest.raises(OutputExistsError, match="it has replaced this result while it was checked"):
        streammerge.merge(rivals.base, rivals.adapter, rivals.out, progress=progress)
    assert streammerge.verify(rivals.out).status == "verified"


class Paused(Exception):
    """Where a run is stopped for good."""


def test_an_overwrite_that_meets_the_end_of_the_run_it_replaces_leaves_what_can_be_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = Rivals(tmp_path, monkeypatch, max_shard_size="3kB", overwrite=True)
    tidy_up, take_away = OutputDirectory._tidy_up, RunFolder.take_away

    def overwritten_first(self: OutputDirectory, *arguments: Any) -> None:
        """The report is in place, and the other run has begun to remove it."""
        with monkeypatch.context() as patch:
            patch.setattr(OutputDirectory, "_tidy_up", tidy_up)
            patch.setattr(RunFolder, "take_away", stop_after_the_report)
            with pytest.raises(Paused):
                rivals.run(**rivals.other)
        tidy_up(self, *arguments)

    def stop_after_the_report(self: RunFolder, name: str) -> None:
        take_away(self, name)
        raise Paused

    with monkeypatch.context() as patch:
        patch.setattr(OutputDirectory, "_tidy_up", overwritten_first)
        patch.setattr(OutputDirectory, "abandon", lambda *_: None)  # as where it is killed
        rivals.run()
    assert not (rivals.out / MARKER).exists()
    assert rivals.run() == "refused"
    assert rivals.run(max_shard_size="3kB") == "done"
    assert bytes_of(rivals.out) == rivals.results[1]


def begin_to_replace(rivals: Rivals, options: Mapping[str, Any], meanwhile: Callable[[], object]) -> str:
    """An overwrite that is held up before it removes the first shard, and what comes meanwhile; how it ended."""
    real = RunFolder.take_away

    def held_up(self: RunFolder, name: str) -> None:
        if name.endswith(".safetensors"):
            with rivals.patch.context() as patch:
                patch.setattr(RunFolder, "take_away", real)
                meanwhile()
        real(self, name)

    with rivals.patch.context() as patch:
        patch.setattr(RunFolder, "take_away", held_up)
        return rivals.run(overwrite=True, **options)


@pytest.mark.parametrize("second", [{"weights": [0.5]}, {}], ids=["another merge", "the same merge"])
def test_of_two_overwrites_at_once_one_finishes_and_the_other_removes_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: Mapping[str, Any]
) -> None:
    rivals = Rivals(tmp_path, monkeypatch, **second)
    assert rivals.run(max_shard_size="3kB") == "done"
    ends = []
    first = begin_to_replace(rivals, {}, lambda: ends.append(rivals.run(overwrite=True, **second)))
    assert (first, ends) == ("refused", ["done"])
    assert bytes_of(rivals.out) == rivals.results[1]


def test_a_finished_result_that_somebody_begins_to_replace_is_no_reason_to_take_his_record_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = Rivals(tmp_path, monkeypatch)
    assert rivals.run() == "done"
    for options in ({"weights": [0.5]}, {}):
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "take_away", lambda *_: (_ for _ in ()).throw(Paused()))
            patch.setattr(OutputDirectory, "alone", False)
            with pytest.raises(Paused):
                rivals.run(overwrite=True, **options)
        (begun,) = OutputDirectory(rivals.out).runs().values()
        assert begun["replaces"]
        assert rivals.run() == "done"
        assert list(OutputDirectory(rivals.out).runs().values()) == [begun]
        assert rivals.run(overwrite=True, **options) == "done"
        assert not (rivals.out / STAGING).exists()
        assert rivals.run(overwrite=True) == "done"
