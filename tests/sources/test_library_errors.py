"""What the safetensors library is given to open, and what it means that it cannot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

import streammerge
from tests.refusals.making import inputs_at, refused

if TYPE_CHECKING:
    import pytest


def test_an_adapter_that_the_library_cannot_open_is_refused_as_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    path = adapter / "adapter_model.safetensors"

    def fail(opened: Path, **_: object) -> None:
        raise FileNotFoundError(f"No such file or directory: {opened}")  # whatever the system said

    monkeypatch.setattr(safetensors, "safe_open", fail)
    refused(3, f"cannot open `{path}`: the safetensors library says", base=base, adapters=adapter)


def test_the_library_maps_nothing_of_an_adapter_that_lies_on_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = inputs_at(tmp_path)
    path = adapter / "adapter_model.safetensors"
    opened: list[tuple[str, bytes, int]] = []
    real = safetensors.safe_open

    def watched(file: str, **options: str) -> object:
        with Path(file).open("rb") as stream:
            opened.append((str(Path(file).resolve()), stream.read(8), os.fstat(stream.fileno()).st_size))
        return real(file, **options)

    monkeypatch.setattr(safetensors, "safe_open", watched)
    streammerge.plan(base, adapter)
    [(where, start, size)] = opened
    assert where.startswith("/memfd:")
    assert (start, size) == (path.read_bytes()[:8], path.stat().st_size)
