"""Where a file that is removed while it is open stays under another name until it is closed, as on NFS and FUSE,
nothing of ours is left behind all the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import streammerge
from streammerge.core import io, locks
from tests.refusals.making import MARKER, STAGING, inputs_at

if TYPE_CHECKING:
    import pytest


def test_the_staging_area_goes_with_the_lock_where_an_open_file_outlives_its_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    staging = tmp_path / "out" / STAGING
    hidden = staging / ".nfs0001"
    remove, close = io.remove, locks.Lock.close

    def renamed(path: str | Path) -> None:
        if Path(path) == staging / "lock":
            Path(path).rename(hidden)
        else:
            remove(path)

    def gone(lock: locks.Lock) -> None:
        close(lock)
        hidden.unlink()

    monkeypatch.setattr(io, "remove", renamed)
    monkeypatch.setattr(locks.Lock, "close", gone)
    streammerge.merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / MARKER).exists()
    assert not staging.exists()
