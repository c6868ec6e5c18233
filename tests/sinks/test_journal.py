"""The journal: what was written down is read again to the bit, and what was not written down in full says nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from streammerge.compute.tile import TileStats
from streammerge.sinks.journal import JOURNAL, Block, Journal, Made, read_journal

FIRST: dict[Block, Made] = {
    (0, 0): Made("a" * 32, (("model.x\u202e.weight", 7, TileStats(0.1, 1e-300, math.pi)), ("y", 0, TileStats(3.0)))),
    (0, 3): Made("b" * 32),
}
SECOND: dict[Block, Made] = {(11, 2): Made("c" * 32, (("z", 1, TileStats(math.inf)),))}


def written(folder: Path, *batches: dict[Block, Made]) -> Path:
    for batch in batches:
        journal = Journal(folder)
        journal.add(batch)
        journal.close()
    return folder / JOURNAL


def test_what_was_written_down_is_read_again(tmp_path: Path) -> None:
    written(tmp_path, FIRST, SECOND)
    assert read_journal(tmp_path) == FIRST | SECOND


def test_without_a_journal_nothing_is_known_and_nothing_is_made(tmp_path: Path) -> None:
    written(tmp_path, {})
    assert read_journal(tmp_path) == {}
    assert not (tmp_path / JOURNAL).exists()


def test_a_line_that_was_cut_off_anywhere_says_nothing_and_harms_no_other(tmp_path: Path) -> None:
    path = written(tmp_path, FIRST)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        written(tmp_path, SECOND)
        found = read_journal(tmp_path)
        assert found.items() >= SECOND.items()
        assert found.items() <= (FIRST | SECOND).items()


def test_no_flipped_bit_changes_what_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, FIRST, SECOND)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert read_journal(tmp_path).items() <= (FIRST | SECOND).items()


@pytest.mark.parametrize(
    "text", [b"", b"\n\n", b"{}", b"[1]", b"\x00" * 99, b"0123456789abcdef [0,0,1,[[]]]", b"[" * 10**5]
)
def test_what_is_not_a_journal_says_nothing(tmp_path: Path, text: bytes) -> None:
    (tmp_path / JOURNAL).write_bytes(text)
    assert read_journal(tmp_path) == {}
