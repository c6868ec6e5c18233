"""Writing past the page cache: the same files to the last byte, refused or done without where it cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from streammerge.core import digests, io
from streammerge.core.errors import WriteError
from streammerge.planning.model import OutputShard
from streammerge.sinks.journal import JOURNAL, Made
from streammerge.sinks.shards import ShardSink, Told
from tests.refusals.making import call, inputs_at, load_all, merged, tree_digest
from tests.sinks.subjects import make_small

PIECE = 2**14
SIZES = (1, 4095, 4096, 4097, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 4096, 5 * PIECE + 12345)


@pytest.fixture
def direct(tmp_path: Path) -> Path:
    """A folder whose file system takes direct writes."""
    if not io.takes_direct_writes(tmp_path):
        pytest.skip(f"the file system of {tmp_path} takes no direct writes")
    return tmp_path


def content(size: int) -> bytes:
    """Bytes of which none is zero, so that padding shows, and none 255, which is what buffers held before."""
    return np.random.default_rng(size).integers(1, 255, size, np.uint8).tobytes()


def write_all(folder: Path, mode: str, sizes: tuple[int, ...] = SIZES) -> tuple[str, dict[int, bytes], list[int]]:
    """Files of these sizes through a sink, their pieces backwards: how, what they hold, and what `wrote` was told."""
    told: list[int] = []
    finished: list[str] = []
    shards = [OutputShard(f"{size}.bin", size, b"", {}) for size in sizes]
    sink = ShardSink(shards, folder, mode, 4, Told(told.append, lambda shard: finished.append(shard.file)))
    try:
        for number, size in enumerate(sizes):
            data = content(size)
            for first in reversed(range(0, size, PIECE)):
                piece = data[first : first + PIECE]
                buffer = sink.lease()
                buffer[:] = b"\xff" * len(buffer)
                buffer[: len(piece)] = piece
                ends = first + len(piece) == min(size, digests.block_range(digests.block_number(first), size)[1])
                sink.commit(number, first, buffer, len(piece), None, Made("") if ends else None)
        sink.finish()
    finally:
        sink.close()
    assert sorted(finished) == sorted(shard.file for shard in shards)
    assert sorted(os.listdir(folder)) == sorted([*finished, JOURNAL])
    return sink.io, {size: (folder / f"{size}.bin").read_bytes() for size in sizes}, told


@pytest.mark.parametrize("mode", ["auto", "direct", "buffered"])
def test_files_have_exactly_their_bytes(direct: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    make_small(monkeypatch, piece=PIECE, block=5 * PIECE)
    how, files, told = write_all(direct, mode)
    assert how == ("buffered" if mode == "buffered" else "direct")
    for size in SIZES:
        assert len(files[size]) == size
        assert files[size] == content(size)
    assert sum(told) == sum(SIZES)


def test_direct_files_are_written_in_whole_pages_and_their_ends_through_the_page_cache(
    direct: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch, piece=PIECE, block=5 * PIECE)
    real, seen = os.pwrite, []

    def noting(fd: int, data: memoryview, offset: int) -> int:
        flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0], 8)
        assert b"\xff" not in bytes(data)
        seen.append((bool(flags & os.O_DIRECT), len(data) % 4096, offset % 4096))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    write_all(direct, "direct")
    assert {entry for entry in seen if entry[0]} == {(True, 0, 0)}
    assert sorted(size for opened, size, at in seen if not opened and not at) == sorted(
        size % 4096 for size in SIZES if size % 4096
    )
    seen.clear()
    (direct / "buffered").mkdir()
    write_all(direct / "buffered", "buffered")
    assert {opened for opened, _, _ in seen} == {False}


def test_auto_falls_back_to_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch, piece=PIECE, block=5 * PIECE)
    monkeypatch.setattr(io, "takes_direct_writes", lambda folder: False)
    how, files, _ = write_all(tmp_path, "auto")
    assert how == "buffered"
    assert files == {size: content(size) for size in SIZES}


def test_buffered_does_not_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "takes_direct_writes", lambda folder: pytest.fail("asked"))
    assert write_all(tmp_path, "buffered", (5,))[0] == "buffered"


def test_asking_leaves_nothing_behind(direct: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(direct.iterdir()) == []
    real = os.open

    def refusing(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, mode))
            raise OSError(22, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    assert not io.takes_direct_writes(direct)
    assert list(direct.iterdir()) == []


def test_what_cannot_be_done_is_refused_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    monkeypatch.setattr(io, "takes_direct_writes", lambda folder: False)
    outcome = call("run", base, adapter, "-o", tmp_path / "out", "--io", "direct")
    assert outcome.code == 2
    assert f"the file system of `{tmp_path}` cannot do it" in outcome.err
    assert "`--io auto` writes through the page cache there" in outcome.err
    assert not (tmp_path / "out").exists()
    merged(base, adapter, tmp_path / "out")


def test_what_cannot_be_done_is_refused_before_a_result_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    before = tree_digest(tmp_path / "out")
    monkeypatch.setattr(io, "takes_direct_writes", lambda folder: False)
    assert call("run", base, adapter, "-o", tmp_path / "out", "--io", "direct", "--overwrite").code == 2
    assert tree_digest(tmp_path / "out") == before


@pytest.mark.parametrize(("mode", "how"), [("direct", "direct"), ("buffered", "buffered"), ("auto", "direct")])
def test_the_command_writes_as_asked_and_says_how(direct: Path, mode: str, how: str) -> None:
    base, adapter = inputs_at(direct)
    outcome = merged(base, adapter, direct / "out", "--io", mode, "--json")
    assert f'"io": "{how}"' in outcome.out
    merged(base, adapter, direct / "healthy", "--io", "buffered")
    assert tree_digest(direct / "out") == tree_digest(direct / "healthy")
    assert load_all(direct / "out")


# --- short writes -----------------------------------------------------------------------------------------------------
class Short:
    """A `pwrite` that takes no more than `most` bytes at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.calls = most, []
        self.real = os.pwrite

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        self.calls.append((offset, len(data)))
        return self.real(fd, data[: self.most], offset)


@pytest.mark.parametrize("most", [4096, 3 * 4096])
def test_a_short_direct_write_is_continued_on_a_page(direct: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    make_small(monkeypatch, piece=PIECE, block=5 * PIECE)
    short = Short(most)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", short)
        patch.setattr(io, "takes_direct_writes", lambda folder: True)
        files = write_all(direct, "direct")[1]
    assert files == {size: content(size) for size in SIZES}
    whole = [(offset, size) for offset, size in short.calls if size >= 4096]
    assert {(offset % 4096, size % 4096) for offset, size in whole} == {(0, 0)}


def test_what_a_short_write_took_beyond_a_page_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write may end anywhere; the next begins where a direct one can. An ordinary file stands in for one on a disk
    whose system call does so."""
    short = Short(4096 + 500)
    data = content(5 * 4096)
    fd = io.create(tmp_path / "file")
    monkeypatch.setattr(os, "pwrite", short)
    io.write_at(fd, "file", 0, data, direct=True)
    io.close(fd)
    assert (tmp_path / "file").read_bytes() == data
    assert [offset for offset, _ in short.calls] == [0, 4096, 8192, 12288, 16384]


@pytest.mark.parametrize("most", [0, 1, 4095])
def test_a_direct_write_of_less_than_a_page_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    fd = io.create(tmp_path / "file")
    monkeypatch.setattr(os, "pwrite", Short(most))
    with pytest.raises(WriteError) as caught:
        io.write_at(fd, "the file", 0, bytes(8192), direct=True)
    io.close(fd)
    assert (caught.value.path, caught.value.operation) == ("the file", "write")
    assert f"only {most:,} of 8,192 bytes were taken" in str(caught.value)


def test_a_buffered_write_of_nothing_is_an_error_and_of_one_byte_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = io.create(tmp_path / "file")
    monkeypatch.setattr(os, "pwrite", Short(1))
    io.write_at(fd, "file", 0, b"abc")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(WriteError, match="only 0 of 3 bytes were taken"):
        io.write_at(fd, "file", 0, b"abc")
    io.close(fd)
    assert (tmp_path / "file").read_bytes() == b"abc"
