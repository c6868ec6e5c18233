"""Going on with what an earlier run has left: only what is good again when it is read again, and all of that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import streammerge
from streammerge.compute.produce import Producer
from streammerge.core import digests
from streammerge.core.errors import InputMissingError, OutputExistsError, WriteError
from streammerge.core.locks import lock
from streammerge.sinks import shards
from streammerge.sinks.buffers import WriteBehind
from streammerge.sinks.directory import MARKER, STAGING, OutputDirectory
from streammerge.sinks.journal import JOURNAL
from tests.refusals.making import tree_digest
from tests.sinks.subjects import make_small, make_subject

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
PIECE, BLOCK = 2**13, 2**14


class Failed(Exception):
    """What a run is stopped with here."""


def written_at_once(behind: WriteBehind, buffer: memoryview, write: Callable[[], None]) -> None:
    """What hands a piece to the writing threads, without them."""
    write()
    behind.release(buffer)


class Subject:
    """A merge of many small blocks that can be stopped, looked at, and gone on with."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.base, self.adapters = make_subject(root, "BF16")
        self.out, self.patch = root / "out", patch
        self.made: list[tuple[int, int]] = []
        self.stop_at: int | None = None
        self.real = Producer.fill
        patch.setattr(Producer, "fill", lambda *arguments: self.fill(*arguments))
        self.merge(root / "healthy")
        self.healthy, self.blocks = tree_digest(root / "healthy"), len(set(self.made))

    def fill(self, producer: Producer, number: int, start: int, end: int, into: memoryview) -> None:
        """Make a piece, unless the run is to stop here."""
        self.made.append((number, digests.block_number(start)))
        if self.stop_at is not None and len(self.made) > self.stop_at:
            raise Failed
        self.real(producer, number, start, end, into)

    def merge(self, out: Path | None = None) -> streammerge.Report:
        """The command; what it makes is in `made` afterwards."""
        self.made = []
        return streammerge.merge(self.base, self.adapters, out or self.out, verify=False, workers=1)

    def stop(self, at: int) -> None:
        """A run that ends after so many pieces, all of them written: it drops those whose turn has not come."""
        self.stop_at = at
        with self.patch.context() as patch:
            patch.setattr(WriteBehind, "submit", written_at_once)
            with pytest.raises(Failed):
                self.merge()
        self.stop_at = None

    @property
    def folder(self) -> Path:
        """The folder of the run that was stopped."""
        (folder,) = [path for path in (self.out / STAGING).iterdir() if path.is_dir()]
        return folder

    def part(self, name: str) -> Path:
        """A file in the making."""
        return self.folder / f"{name}{shards.PART}"

    def finish(self) -> set[tuple[int, int]]:
        """Let the same command finish, and see that the result is right; the blocks that it made."""
        report = self.merge()
        made = set(self.made)
        self.patch.setattr(Producer, "fill", self.real)
        assert tree_digest(self.out) == self.healthy
        assert streammerge.verify(self.out, full=True).checked
        assert report.status == "done"
        assert not (self.out / STAGING).exists()
        return made


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    make_small(monkeypatch, piece=PIECE, block=BLOCK)
    return Subject(tmp_path, monkeypatch)


def test_blocks_that_are_there_are_not_made_again(subject: Subject) -> None:
    subject.stop(9)
    finished = {block for block in subject.made[:8] if subject.made[:9].count(block) == 2}
    assert len(finished) >= 3
    assert subject.finish().isdisjoint(finished)


def test_a_run_that_lost_nothing_only_publishes(subject: Subject) -> None:
    real = OutputDirectory.publish
    subject.patch.setattr(OutputDirectory, "publish", lambda *_: (_ for _ in ()).throw(Failed()))
    with pytest.raises(Failed):
        subject.merge()
    subject.patch.setattr(OutputDirectory, "publish", real)
    assert subject.finish() == set()


@pytest.mark.parametrize("place", ["part", "staged", "published"])
def test_a_block_that_was_damaged_is_made_again(subject: Subject, place: str) -> None:
    subject.stop(subject.blocks * 2 - 3)
    path = {"part": lambda: subject.part(SECOND), "staged": lambda: subject.folder / FIRST}.get(
        place, lambda: shutil.move(subject.folder / FIRST, subject.out)
    )()
    path = subject.out / FIRST if place == "published" else path
    whole = bytearray(path.read_bytes())
    whole[BLOCK + 5] ^= 4
    path.write_bytes(whole)
    made = subject.finish()
    number = 1 if place == "part" else 0
    assert (number, 1) in made
    # What is in place is left alone until it is replaced: it may be another run's.
    assert ((number, 0) in made) == (place == "published")


def test_a_published_file_that_is_good_stays_where_it_is(subject: Subject) -> None:
    subject.stop(subject.blocks * 2 - 3)
    shutil.move(subject.folder / FIRST, subject.out)
    before = (subject.out / FIRST).stat()
    made = subject.finish()
    after = (subject.out / FIRST).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert 0 not in {number for number, _ in made}


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def shorter(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [longer, shorter, os.unlink])
def test_a_staged_file_of_another_size_is_not_taken(subject: Subject, change: Callable[[Path], None]) -> None:
    subject.stop(subject.blocks * 2 - 3)
    change(subject.folder / FIRST)
    assert 0 in {number for number, _ in subject.finish()}


def test_without_a_journal_all_is_made_again(subject: Subject) -> None:
    subject.stop(subject.blocks * 2 - 3)
    (subject.folder / JOURNAL).unlink()
    assert len(subject.finish()) == subject.blocks


def test_of_a_staged_file_and_one_in_the_making_the_one_with_more_good_blocks_is_taken(subject: Subject) -> None:
    subject.stop(9)
    (subject.folder / FIRST).write_bytes(b"\0" * subject.part(FIRST).stat().st_size)
    finished = {block for block in subject.made[:8] if subject.made[:9].count(block) == 2}
    assert subject.finish().isdisjoint(finished)


def test_a_sync_that_failed_is_not_tried_again_and_its_blocks_are_not_written_down(subject: Subject) -> None:
    failed: list[str] = []
    real = shards.io.sync_file

    def sync(fd: int, path: str) -> None:
        if path.endswith(shards.PART):
            failed.append(path)
            raise WriteError(path, "sync", "Input/output error")
        real(fd, path)

    with subject.patch.context() as patch:
        patch.setattr(shards.io, "sync_file", sync)
        with pytest.raises(WriteError, match="cannot sync"):
            subject.merge()
    assert len(failed) == len(set(failed))
    assert not subject.out.exists() or not (subject.out / STAGING).exists()
    assert len(subject.finish()) == subject.blocks


def test_a_run_whose_folder_was_taken_over_stops(subject: Subject) -> None:
    calls = 0

    def take_over(self: shards.ShardFile) -> None:
        nonlocal calls
        calls += 1
        subject.folder.rename(subject.folder.with_name(f"{subject.folder.name.partition('.')[0]}.other"))
        real(self)

    real = shards.ShardFile.stage
    with subject.patch.context() as patch:
        patch.setattr(shards.ShardFile, "stage", take_over)
        with pytest.raises(OutputExistsError, match="another run is at work on .* vanished while it was in use"):
            subject.merge()
    assert calls == 1
    assert not (subject.out / MARKER).exists()
    assert 0 not in {number for number, _ in subject.finish()}


def test_another_process_at_work_on_the_output_is_named(subject: Subject) -> None:
    (subject.out / STAGING).mkdir(parents=True)
    held = lock(subject.out / STAGING / "lock")
    assert held is not None
    with pytest.raises(OutputExistsError, match="another run is at work on"):
        subject.merge()
    held.close()
    subject.finish()


def test_a_file_that_vanishes_while_the_output_is_looked_at_is_another_runs_doing(subject: Subject) -> None:
    subject.stop(9)
    real = shards.io.size_of

    def vanished(path: Path) -> int:
        if path.name == JOURNAL:
            raise InputMissingError(str(path))
        return real(path)

    with subject.patch.context() as patch:
        patch.setattr(shards.io, "size_of", vanished)
        with pytest.raises(OutputExistsError, match="vanished while it was in use"):
            subject.merge()
    subject.finish()


def test_where_there_are_no_locks_everybody_may_work(subject: Subject) -> None:
    import errno
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    subject.patch.setattr(fcntl, "flock", no_locks)
    subject.finish()
