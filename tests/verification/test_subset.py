"""A verification in parts: together they are the whole, no two look at the same block, and a part that there is not is
refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import streammerge
from streammerge.core import digests
from streammerge.core.errors import UsageError, VerificationError
from streammerge.integrity import Part, read_marker
from tests.refusals.making import INDEX, MARKER, call
from tests.sinks.subjects import make_small, make_subject
from tests.verification.outputs import FIRST, finished, flip

BLOCK = 2**14


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output of many small blocks."""
    make_small(monkeypatch, piece=2**13, block=BLOCK)
    base, adapters = make_subject(tmp_path, "BF16")
    streammerge.merge(base, adapters, tmp_path / "out", verify=False)
    return tmp_path / "out"


def every_block(out: Path) -> set[tuple[str, int]]:
    """All blocks of all files, by their sizes on the disk."""
    document = json.loads((out / MARKER).read_text())
    names = [*document["files"], *document["sidecars"]]
    sizes = {name: (out / name).stat().st_size for name in names}
    return {(name, block) for name, size in sizes.items() for block in range(-(-size // BLOCK))}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 1000])
def test_the_parts_are_disjoint_and_together_all_blocks(out: Path, count: int) -> None:
    document, whole = read_marker(out), every_block(out)
    parts = [Part(number, count).of(document) for number in range(1, count + 1)]
    assert len(whole) >= 20
    assert set().union(*parts) == whole
    assert sum(len(part) for part in parts) == len(whole)
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1


def test_runs_over_all_parts_check_every_block_once_and_derive_every_weight_block_once(out: Path) -> None:
    found = [streammerge.verify(out, subset=(number, 3), full=True) for number in (1, 2, 3)]
    whole = streammerge.verify(out, full=True)
    assert sum(report.checked for report in found) == whole.checked == len(every_block(out))
    assert sum(report.rederived for report in found) == whole.rederived
    assert whole.rederived == sum(".safetensors" in name and "json" not in name for name, _ in every_block(out))


def finders(out: Path, count: int) -> list[int]:
    """The parts that find something wrong."""
    found = []
    for number in range(1, count + 1):
        try:
            streammerge.verify(out, subset=(number, count))
        except VerificationError:
            found.append(number)
    return found


def test_a_flipped_bit_is_found_by_exactly_one_part_and_every_part_finds_some(out: Path) -> None:
    shutil.rmtree(out.parent / "base")  # digests only
    path = max(out.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    by: list[int] = []
    for block in range(1, digests.block_count(path.stat().st_size)):
        flip(path, block * BLOCK + 77, bit=block % 8)
        found = finders(out, 4)
        assert len(found) == 1, f"block {block} was found by the parts {found}"
        by += found
        flip(path, block * BLOCK + 77, bit=block % 8)
    assert set(by) == {1, 2, 3, 4}
    assert finders(out, 4) == []


def test_the_structure_is_part_of_every_part(out: Path) -> None:
    (out / INDEX).unlink()
    assert finders(out, 4) == [1, 2, 3, 4]


def test_what_was_derived_again_lies_in_the_part(out: Path) -> None:
    report = streammerge.verify(out, subset=(1, 1000))
    assert (report.checked, report.rederived) == (1, 1)
    empty = streammerge.verify(out, subset=(1000, 1000))
    assert (empty.checked, empty.rederived) == (0, 0)


def test_the_command_takes_a_part_and_says_that_it_is_one(tmp_path: Path) -> None:
    _, _, out = finished(tmp_path)
    outcome = call("verify", out, "--subset", "2/3")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{out}: verified, 2 blocks checked, 1 block derived again from the inputs\n"
    assert "note: this was part 2 of 3: all 3 together are the whole output" in outcome.err
    assert "part" not in call("verify", out, "--subset", "1/1").err
    data = json.loads(call("verify", out, "--subset", "3/3", "--json").out)
    assert data["blocks_checked"] == 2
    assert data["notes"] == ["this was part 3 of 3: all 3 together are the whole output"]
    flip(out / FIRST, -1)
    codes = [call("verify", out, "--subset", f"{number}/3").code for number in (1, 2, 3)]
    assert sorted(codes) == [0, 0, 6]


@pytest.mark.parametrize(
    "text", ["0/5", "6/5", "1/0", "0/0", "-1/5", "2", "2/", "/5", "a/b", "1.5/5", "2/5/7", "", "\u0662/\u0665"]
)
def test_a_part_that_there_is_not_is_refused(tmp_path: Path, text: str) -> None:
    outcome = call("verify", tmp_path, f"--subset={text}")
    assert outcome.code == 2
    assert f"`{text}` is not a part such as 2/5: one of five, counted from 1" in outcome.err


@pytest.mark.parametrize("subset", [(0, 5), (6, 5), (1, 0), (-1, -1)])
def test_the_library_refuses_it_too(tmp_path: Path, subset: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"part {subset[0]} of {subset[1]} is none"):
        streammerge.verify(tmp_path, subset=subset)
