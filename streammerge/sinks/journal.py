"""What a run has made so far, in a file that survives it: one line for each block of an output file.

A block is written down when its bytes are durable, with its digest and what was measured while it was made, so that
another run can take it as it is. Every line carries its own checksum: one that was cut off, or is not ours, says
nothing, and nothing that a line says is believed before the bytes have been read again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from streammerge.compute.tile import TileStats
from streammerge.core import io
from streammerge.core.errors import InputMissingError

JOURNAL = "journal"
LIMIT = 2**30
"""Bytes of a journal that are read; a line is some kilobytes, and stands for 64 MiB."""
Block = tuple[int, int]
"""An output file and a block of it, by their numbers."""
Note = tuple[str, int, TileStats]
"""A tensor, one of its tiles, and what was measured of it."""


@dataclass(frozen=True, slots=True)
class Made:
    """A block as it was made: its digest, and the measurements of its tiles."""

    digest: str
    notes: tuple[Note, ...] = ()


class Journal:
    """The journal of one run, open for adding to it."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / JOURNAL)
        self._fd: int | None = None

    def add(self, blocks: Mapping[Block, Made]) -> None:
        """Write blocks down whose bytes are durable, and make that durable too."""
        if not blocks:
            return
        if self._fd is None:
            self._fd = io.open_journal(self._path)
            io.sync_dir(Path(self._path).parent)
        # The line before may have been cut off: this one begins on its own.
        io.append(self._fd, self._path, b"\n" + b"".join(_line(block, made) for block, made in blocks.items()))
        io.sync_file(self._fd, self._path)

    def close(self) -> None:
        """Nothing more is added."""
        if self._fd is not None:
            io.close(self._fd)
            self._fd = None


def read_journal(folder: Path) -> dict[Block, Made]:
    """Every block that some run wrote down; a line that is damaged is left out."""
    try:
        data = io.read_file(folder / JOURNAL, LIMIT)
    except InputMissingError:
        return {}
    return dict(found for line in data.split(b"\n") if (found := _parsed(line)))


def _line(block: Block, made: Made) -> bytes:
    notes = [[name, tile, *(value.hex() for value in _values(stats))] for name, tile, stats in made.notes]
    text = json.dumps([*block, made.digest, notes], ensure_ascii=True, separators=(",", ":")).encode()
    return f"{xxhash.xxh3_64_hexdigest(text)} ".encode() + text + b"\n"


def _parsed(line: bytes) -> tuple[Block, Made] | None:
    checksum, _, text = line.partition(b" ")
    if not text or xxhash.xxh3_64_hexdigest(text).encode() != checksum:
        return None
    try:
        shard, block, digest, notes = json.loads(text)
        if not type(shard) is type(block) is int:
            return None
        return (shard, block), Made(str(digest), tuple(_note(*note) for note in notes))
    except (ValueError, TypeError, RecursionError):
        return None


def _note(name: str, tile: int, *values: str) -> Note:
    return name, tile, TileStats(*(float.fromhex(value) for value in values))


def _values(stats: TileStats) -> Iterable[float]:
    return stats.delta, stats.sampled, stats.survived
