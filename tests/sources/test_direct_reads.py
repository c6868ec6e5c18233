"""`--read direct`: any range of a file, read past the page cache by way of whole pages."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.core import io, paths
from streammerge.core.errors import InputReadError
from streammerge.core.tensors import TensorInfo
from streammerge.sources.files import Scratch, TensorFiles
from tests.refusals.making import call, inputs_at, merged, tree_digest

SIZE = 3 * 4096 + 777
CONTENT = np.random.default_rng(5).integers(0, 256, SIZE, np.uint8).tobytes()
START = 13
WHOLE = TensorInfo("w", "U8", (SIZE - START,), "file", START, SIZE - START)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one file of no whole number of pages."""
    (tmp_path / "file").write_bytes(CONTENT)
    fd = io.open_direct(str(tmp_path / "file"))
    if fd is None:
        pytest.skip(f"the file system of {tmp_path} takes no direct reads")
    io.close(fd)
    return tmp_path


def test_direct_files_are_not_mapped_and_are_opened_past_the_page_cache(root: Path) -> None:
    files = TensorFiles(root, "direct")
    file = files.opened("file")
    assert file.mapping is None
    assert not files.mapped
    assert file.direct is not None
    flags = int(Path(f"/proc/self/fdinfo/{file.direct}").read_text().split("flags:")[1].split()[0], 8)
    assert flags & os.O_DIRECT
    for mode in ("mmap", "pread", "auto"):
        assert TensorFiles(root, mode).opened("file").direct is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranges=st.lists(st.tuples(st.integers(0, SIZE - START), st.integers(0, SIZE - START)), max_size=5))
def test_any_range_is_that_part_of_the_file(root: Path, ranges: list[tuple[int, int]]) -> None:
    files, scratch = TensorFiles(root, "direct"), Scratch()
    for pair in ranges:
        start, end = sorted(pair)
        wanted = CONTENT[START + start : START + end]
        assert bytes(files.read(WHOLE, start, end, scratch)) == wanted
        into = bytearray(end - start)
        files.copy(WHOLE, start, end, memoryview(into), scratch)
        assert into == wanted


@pytest.mark.parametrize("length", [0, 1, 776, 777, 778, 4096 + 777, SIZE - START])
def test_the_end_of_the_file_is_read_to_its_last_byte(root: Path, length: int) -> None:
    end = SIZE - START
    assert bytes(TensorFiles(root, "direct").read(WHOLE, end - length, end)) == CONTENT[SIZE - length :]


def test_only_whole_pages_are_asked_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, seen, real = TensorFiles(root, "direct"), [], os.preadv

    def noting(fd: int, buffers: list[memoryview], offset: int) -> int:
        seen.append((offset, len(buffers[0])))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", noting)
    files.read(WHOLE, 4090, 4091)
    files.read(WHOLE, 4000, 8200)
    assert seen == [(4096, 4096), (0, 12288)]


def test_a_short_read_is_continued(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:4096]], offset))
    assert bytes(TensorFiles(root, "direct").read(WHOLE, 0, SIZE - START)) == CONTENT[START:]


def test_a_read_that_ends_within_a_page_before_the_end_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 4095)
    with pytest.raises(InputReadError, match=r"only 4,095 of 12,301 bytes came"):
        TensorFiles(root, "direct").read(WHOLE, 0, 3 * 4096)


def test_a_file_that_ends_before_its_bytes_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is looked at before each read; what shrinks after that look is met by the read itself."""
    files = TensorFiles(root, "direct")
    file = files.opened("file")
    os.truncate(root / "file", 4096)
    with pytest.raises(InputReadError, match=r"the file ends at byte 4,096"):
        file.read(100, 9000, Scratch())
    with pytest.raises(InputReadError, match=r"changed while it was being used: it had 13,065 bytes and has 4,096"):
        files.read(WHOLE, 0, 10)


def test_a_file_system_without_direct_reads_is_refused_with_what_it_lacks(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "open_direct", lambda path: None)
    with pytest.raises(InputReadError) as caught:
        TensorFiles(root, "direct").opened("file")
    assert caught.value.operation == "read past the page cache"
    assert "its file system does not offer that" in str(caught.value)
    assert TensorFiles(root, "auto").opened("file").direct is None


def test_the_command_says_so_and_writes_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(root)
    monkeypatch.setattr(io, "open_direct", lambda path: None)
    outcome = call("run", base, adapter, "-o", root / "out", "--read", "direct")
    assert outcome.code == InputReadError.exit_code
    assert "cannot read past the page cache" in outcome.err
    assert "does not offer that" in outcome.err
    assert not (root / "out").exists()


def test_einval_is_what_tells_that_a_file_system_cannot(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(code: int) -> None:
        def refuse(path: str, flags: int) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "open", refuse)

    refusing(22)
    assert io.open_direct("file") is None
    refusing(13)
    with pytest.raises(InputReadError, match="Permission denied"):
        io.open_direct("file")


def test_a_merge_reads_and_verifies_the_same(root: Path) -> None:
    base, adapter = inputs_at(root)
    merged(base, adapter, root / "out", "--read", "direct")
    merged(base, adapter, root / "healthy", "--read", "mmap")
    assert tree_digest(root / "out") == tree_digest(root / "healthy")
    assert call("verify", root / "out", "--full", "--read", "direct").code == 0


def test_scratch_is_aligned_and_used_again() -> None:
    scratch = Scratch()
    first = scratch.take(5000)
    assert len(first) == 8192
    assert scratch.take(8192) is first
    assert len(scratch.take(8193)) == 12288


def test_a_file_on_another_machine_is_read_and_not_mapped_wherever_its_directory_is(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "is_on_network", lambda path: str(path).endswith("/file"))
    assert TensorFiles(root, "auto").opened("file").mapping is None
    assert TensorFiles(root, "mmap").opened("file").mapping is not None
