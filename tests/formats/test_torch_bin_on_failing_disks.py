"""A `.bin` file that the disk does not give back is one that cannot be read, not a malformed one."""

from __future__ import annotations

import contextlib
import errno
import io as stdio
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.core import io
from streammerge.core.errors import InputReadError
from streammerge.formats.torch_bin import read_torch_bin

BASE = torch.arange(12, dtype=torch.float32).reshape(3, 4)


def test_a_directory_that_the_disk_does_not_give_back_is_not_called_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": BASE}, path := tmp_path / "m.bin")

    class Failing(stdio.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(io, "input_stream", lambda fd, _: contextlib.nullcontext(Failing(path.read_bytes())))
    with pytest.raises(InputReadError, match=f"cannot read `{path}`: Input/output error"):
        read_torch_bin(path, "m.bin")


def test_a_file_that_torch_cannot_open_is_not_called_malformed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": BASE}, path := tmp_path / "m.bin")

    def load(file: str, **_: Any) -> Any:
        """What torch does with every file, with one that somebody removes at that moment."""
        Path(file).unlink()
        return torch.UntypedStorage.from_file(file, False, 48)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(InputReadError, match=f"cannot map `{path}`: No such file or directory"):
        read_torch_bin(path, "m.bin")
