"""Whichever write fails, the run ends with its error, leaves nothing a loader would take and no thread behind, and the
same command finishes the job."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.core import io
from streammerge.core.errors import WriteError
from streammerge.sinks import shards
from tests.refusals.making import assert_nothing_loadable, tree_digest
from tests.sinks.subjects import make_small, make_subject


class NthWrite:
    """`io.write_at` that fails for want of space at the `n`-th piece of a weight file, and from then on."""

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0
        self.real, self.lock = io.write_at, threading.Lock()

    def __call__(self, fd: int, path: str, offset: int, data: Any, *, direct: bool = False) -> None:
        # The end of a file, which is written by itself, belongs to its last piece.
        if path.endswith(f".safetensors{shards.PART}") and offset % 2**14 == 0:
            with self.lock:
                self.count += 1
                full = self.count >= self.n
            if full:
                raise WriteError(path, "write", os.strerror(errno.ENOSPC))
        self.real(fd, path, offset, data, direct=direct)


def ours() -> list[str]:
    """Names of the threads of ours that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streammerge")]


def pieces(base: Path) -> int:
    """Pieces of all weight files, as `make_small` cuts them."""
    return sum(-(-path.stat().st_size // 2**14) for path in base.glob("*.safetensors"))


@pytest.mark.parametrize("write", ["auto", "buffered"])
def test_a_disk_that_is_full_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "BF16")
    count = pieces(base)
    assert count > 20
    healthy = {}
    for hashed in (False, True):
        streammerge.merge(base, adapters, tmp_path / f"healthy-{hashed}", workers=1, sha256=hashed)
        healthy[hashed] = tree_digest(tmp_path / f"healthy-{hashed}")
    for n in range(1, count + 1):
        out = tmp_path / f"out-{n}"
        with monkeypatch.context() as patch:
            patch.setattr(io, "write_at", NthWrite(n))
            with pytest.raises(WriteError) as caught:
                streammerge.merge(base, adapters, out, workers=2, io=write, sha256=n % 2 == 0)
        assert "No space left on device" in str(caught.value)
        assert ".safetensors" in caught.value.path
        assert_nothing_loadable(out)
        assert ours() == []
        streammerge.merge(base, adapters, out, workers=2, io=write, sha256=n % 2 == 0, verify=False)
        assert tree_digest(out) == healthy[n % 2 == 0]


def test_all_writes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write more than there are is one that never fails."""
    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "BF16")
    monkeypatch.setattr(io, "write_at", NthWrite(pieces(base) + 1))
    assert streammerge.merge(base, adapters, tmp_path / "out", workers=2).status == "done"
    assert ours() == []


@pytest.mark.parametrize("operation", ["create", "allocate", "sync_file"])
def test_a_file_that_cannot_be_begun_or_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "BF16")
    real = getattr(io, operation)

    def failing(*arguments: Any, **named: Any) -> Any:
        path = next(str(item) for item in arguments if isinstance(item, str | Path))
        if "-00002.safetensors" in path:
            raise WriteError(path, operation, os.strerror(errno.EIO))
        return real(*arguments, **named)

    monkeypatch.setattr(io, operation, failing)
    with pytest.raises(WriteError, match="Input/output error"):
        streammerge.merge(base, adapters, tmp_path / "out", workers=2)
    assert_nothing_loadable(tmp_path / "out")
    assert ours() == []


def test_an_error_while_tiles_are_made_ends_the_writing_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streammerge.compute.worker import TileWorker

    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "BF16")
    real = TileWorker.fill

    def failing(worker: TileWorker, recipe: Any, start: int, end: int, into: memoryview) -> None:
        if "down_proj" in recipe.output.name:
            raise MemoryError("no more")
        real(worker, recipe, start, end, into)

    monkeypatch.setattr(TileWorker, "fill", failing)
    with pytest.raises(MemoryError, match="no more"):
        streammerge.merge(base, adapters, tmp_path / "out", workers=2)
    assert_nothing_loadable(tmp_path / "out")
    assert ours() == []
