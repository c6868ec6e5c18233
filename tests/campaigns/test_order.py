"""The order checker: quiet about a run as it is, and it speaks up at each step that is taken too early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streammerge.core import io
from streammerge.sinks.directory import CONFIG, INDEX, MARKER, STAGING, OutputDirectory
from tests.campaigns.order import ORDER
from tests.refusals.making import inputs_at, merged

pytestmark = pytest.mark.out_of_order
IDENTITY = {"fingerprint": "f" * 64}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[OutputDirectory]:
    """A claimed output."""
    found = OutputDirectory(tmp_path / "out")
    found.claim(IDENTITY, ["model.safetensors"], overwrite=False)
    assert ORDER.wrong == []
    yield found
    found.release()


def staged(directory: OutputDirectory, name: str = "model.safetensors", *, synced: bool = True) -> Path:
    """A file in the folder of the run."""
    path = directory.run / f"{name}.part"
    fd = io.create(path)
    io.write_at(fd, str(path), 0, b"bytes")
    if synced:
        io.sync_file(fd, str(path))
    io.close(fd)
    return path


def test_a_run_and_an_overwrite_are_in_order(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    merged(base, adapter, tmp_path / "out", "--overwrite", "--dtype", "float32")
    assert ORDER.wrong == []


def test_a_file_that_was_written_to_after_its_sync_is_renamed_too_early(directory: OutputDirectory) -> None:
    path = staged(directory)
    fd = io.open_again(path)
    io.write_at(fd, str(path), 0, b"later")
    io.close(fd)
    io.rename(path, directory.path / "model.safetensors")
    assert "before it is synced" in ORDER.wrong[0]


def test_an_index_before_the_directory_entries_of_its_shards_is_too_early(directory: OutputDirectory) -> None:
    io.rename(staged(directory), directory.path / "model.safetensors")
    directory.own.put(INDEX, b'{"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}}', directory.path)
    assert "appears before the directory entries of ['model.safetensors'] are durable" in ORDER.wrong[0]
    assert "appears before ['other.safetensors']" in ORDER.wrong[1]


def test_a_shard_after_the_config_is_too_late(directory: OutputDirectory) -> None:
    directory.own.put(CONFIG, b"{}", directory.path)
    io.rename(staged(directory), directory.path / "model.safetensors")
    assert f"`model.safetensors` appears when {[CONFIG, CONFIG]} is there" in ORDER.wrong


def test_data_that_is_removed_before_the_report_is_durably_gone_is_removed_too_early(
    directory: OutputDirectory,
) -> None:
    for name in ("data", MARKER):
        (directory.path / name).write_text("{}")
    io.remove(directory.path / "data")
    assert f"`data` is removed before ['{MARKER}'] is, durably" in ORDER.wrong
    ORDER.wrong.clear()
    (directory.path / "data").write_text("{}")
    io.remove(directory.path / MARKER)
    io.remove(directory.path / "data")
    assert f"`data` is removed before ['{MARKER}'] is, durably" in ORDER.wrong


def test_a_file_outside_the_output_is_not_to_be_written(directory: OutputDirectory, tmp_path: Path) -> None:
    io.close(io.create(tmp_path / "elsewhere"))
    assert ORDER.wrong == [f"`{tmp_path / 'elsewhere'}` is written to, and lies in none of the outputs"]


def test_a_link_is_not_to_be_opened_for_writing(
    directory: OutputDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "victim").write_text("mine")
    (directory.path / STAGING / "link").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(io, "_open", lambda path, operation, flags: os.open(path, os.O_RDWR))
    io.close(io.open_again(directory.path / STAGING / "link"))
    assert ORDER.wrong == [f"`{directory.path / STAGING / 'link'}` is a link, and was opened for writing"]
