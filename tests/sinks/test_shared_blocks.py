"""What nothing touches shares the base's blocks where files can, and is a copy everywhere else."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import streammerge
from streammerge.core import io
from streammerge.planning.memory import PIECE
from tests.refusals.making import CONFIG, PREFIX, Stored, load, make_adapter, tree_digest, write_json
from tests.sinks.subjects import exact, rounded, save_as_laid

FIEMAP, SYNC, SHARED, LAST = 0xC020660B, 1, 0x2000, 1
"""ioctl FS_IOC_FIEMAP, and its flags."""
BLOCK = 4096
TENSORS = {"model.one.weight": (3001, 2048), "model.merged.weight": (130, 2048), "model.two.weight": (5003, 2048)}
"""12.3 MB, 0.5 MB and 20.5 MB in bf16."""


def make_inputs(root: Path) -> tuple[Path, Path, dict[str, Stored]]:
    generator = np.random.default_rng(3)
    tensors = {
        name: Stored("BF16", shape, generator.integers(0x3C00, 0x3F80, shape, np.uint16).tobytes())
        for name, shape in TENSORS.items()
    }
    save_as_laid(root / "base" / "model.safetensors", tensors)
    write_json(root / "base" / "config.json", dict(CONFIG))
    out, inputs = TENSORS["model.merged.weight"]
    a, b = exact("A", 2, inputs), exact("B", out, 2)
    factors = {f"{PREFIX}model.merged.lora_A.weight": a, f"{PREFIX}model.merged.lora_B.weight": b}
    return root / "base", make_adapter(root / "adapter", factors, r=2, lora_alpha=2), tensors


def extents(path: Path) -> Iterator[tuple[int, int, int, bool]]:
    """Where the bytes of a file lie: first byte, place on the disk, length, and whether another file shares them."""
    with path.open("rb") as stream:
        start = 0
        while True:
            count = 256
            request = bytearray(struct.pack("=QQLLLL", start, 2**63, SYNC, 0, count, 0) + bytes(56 * count))
            fcntl.ioctl(stream, FIEMAP, request)
            found = struct.unpack_from("=QQLLLL", request)[3]
            for number in range(found):
                logical, physical, length, _, _, flags = struct.unpack_from("=QQQQQL", request, 32 + 56 * number)
                yield logical, physical, length, bool(flags & SHARED)
                start = logical + length
            if not found or flags & LAST:
                return


def places(path: Path) -> dict[int, tuple[int, bool]]:
    """Of every block of a file where it lies, and whether it is shared."""
    return {
        logical // BLOCK + number: (physical // BLOCK + number, shared)
        for logical, physical, length, shared in extents(path)
        for number in range(-(-length // BLOCK))
    }


def untouched_pieces(path: Path) -> list[range]:
    """The blocks of every whole piece in which nothing of the merged tensor and of the header lies."""
    size = path.stat().st_size
    data = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    low = data + 3001 * 2048 * 2
    high = low + 130 * 2048 * 2
    starts = [start for start in range(PIECE, size - PIECE + 1, PIECE) if start + PIECE <= low or start >= high]
    return [range(start // BLOCK, (start + PIECE) // BLOCK) for start in starts]


def free(path: Path) -> int:
    os.sync()
    found = os.statvfs(path)
    return found.f_bfree * found.f_frsize


@pytest.fixture(scope="module")
def inputs(sharing: Path) -> tuple[Path, Path, dict[str, Stored]]:
    return make_inputs(sharing)


@pytest.mark.parametrize("write", ["direct", "buffered"])
@pytest.mark.parametrize("read", ["mmap", "pread", "direct"])
def test_untouched_pieces_share_blocks_with_the_base(
    sharing: Path, inputs: tuple[Path, Path, dict[str, Stored]], write: str, read: str
) -> None:
    base, adapter, tensors = inputs
    out = sharing / f"{write}-{read}"
    before = free(sharing)
    report = streammerge.merge(base, adapter, out, io=write, read=read, workers=2)
    assert report.io == write
    taken = before - free(sharing)
    ours, theirs = (root / "model.safetensors" for root in (out, base))
    whole = untouched_pieces(theirs)
    assert len(whole) == 4
    # The header, the merged tensor and what is left at the end are copied; the rest of 33 MB is not.
    assert taken < ours.stat().st_size - len(whole) * PIECE + 2 * 2**20
    here, there = places(ours), places(theirs)
    for blocks in whole:
        assert [here[block] for block in blocks] == [(there[block][0], True) for block in blocks]
    verified = streammerge.verify(out, full=True)
    assert verified.status == "verified"
    assert_merged(load(ours), tensors)


def assert_merged(ours: dict[str, Stored], tensors: dict[str, Stored]) -> None:
    """The values are those of the formula; untouched tensors are those of the base."""
    for name in ("model.one.weight", "model.two.weight"):
        assert ours[name] == tensors[name]
    stored = tensors["model.merged.weight"]
    wide = (np.frombuffer(stored.data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(stored.shape)
    a, b = (np.frombuffer(exact(*of).data, np.float32).reshape(of[1:]) for of in (("A", 2, 2048), ("B", 130, 2)))
    value = wide.astype(np.float64) + b.astype(np.float64) @ a.astype(np.float64)
    assert ours["model.merged.weight"].data == rounded(value, "BF16")


@pytest.mark.parametrize("write", ["direct", "buffered"])
def test_a_change_of_the_output_does_not_reach_the_base(
    sharing: Path, inputs: tuple[Path, Path, dict[str, Stored]], write: str
) -> None:
    base, adapter, _ = inputs
    out = sharing / f"changed-{write}"
    streammerge.merge(base, adapter, out, io=write)
    before = tree_digest(base)
    blocks = untouched_pieces(base / "model.safetensors")[1]
    with (out / "model.safetensors").open("r+b") as stream:
        for block in (blocks.start, blocks[len(blocks) // 2], blocks.stop - 1):
            stream.seek(block * BLOCK + 17)
            stream.write(b"changed")
        os.fsync(stream.fileno())
    assert tree_digest(base) == before
    assert places(out / "model.safetensors")[blocks.start][1] is False


def test_a_change_of_the_base_does_not_reach_the_output(sharing: Path) -> None:
    base, adapter, _ = make_inputs(sharing / "own")
    streammerge.merge(base, adapter, sharing / "own" / "out")
    before = (sharing / "own" / "out" / "model.safetensors").read_bytes()
    with (base / "model.safetensors").open("r+b") as stream:
        stream.seek(3 * PIECE + 5)
        stream.write(b"changed")
        os.fsync(stream.fileno())
    assert (sharing / "own" / "out" / "model.safetensors").read_bytes() == before


def test_where_files_cannot_share_the_same_merge_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, tensors = make_inputs(tmp_path)
    asked: list[tuple[int, int, int]] = []

    def refuse(source: int, source_offset: int, target: int, offset: int, size: int) -> bool:
        asked.append((source_offset, offset, size))
        return False

    monkeypatch.setattr(io, "clone", refuse)
    streammerge.merge(base, adapter, tmp_path / "out")
    assert_merged(load(tmp_path / "out" / "model.safetensors"), tensors)
    assert sorted(asked) == [
        (blocks.start * BLOCK, blocks.start * BLOCK, PIECE) for blocks in untouched_pieces(base / "model.safetensors")
    ]


def test_a_refused_clone_changes_nothing(tmp_path: Path) -> None:
    """Ranges that are no whole blocks are never shared, whatever the file system."""
    (tmp_path / "source").write_bytes(b"s" * 8192)
    source, target = io.open_input(tmp_path / "source"), io.create(tmp_path / "target")
    io.write_at(target, "target", 0, b"t" * 8192)
    assert not io.clone(source, 1, target, 0, 100)
    io.close(source)
    io.close(target)
    assert (tmp_path / "target").read_bytes() == b"t" * 8192


def test_pieces_at_other_offsets_are_copied(sharing: Path, inputs: tuple[Path, Path, dict[str, Stored]]) -> None:
    """A re-sharded output has another header; where blocks cannot fall together it is a copy, and right."""
    base, adapter, tensors = inputs
    out = sharing / "sharded"
    streammerge.merge(base, adapter, out, max_shard_size="13MB")
    found = {name: item for path in sorted(out.glob("*.safetensors")) for name, item in load(path).items()}
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_merged(found, tensors)
