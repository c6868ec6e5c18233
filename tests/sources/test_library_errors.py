"""An adapter that the safetensors library cannot open is an input that cannot be read, not a bug of ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

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
