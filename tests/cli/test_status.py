"""`streammerge status`: what is in an output directory, said without reading a weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streammerge.core import digests
from streammerge.core.locks import lock
from tests.refusals.making import STAGING, call, inputs_at, merged, staged


def status(out: Path) -> dict[str, object]:
    """The status as JSON."""
    outcome = call("status", out, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


def test_where_nothing_is_a_run_begins(tmp_path: Path) -> None:
    found = status(tmp_path / "out")
    assert (found["state"], found["next"], found["merges"]) == ("empty", "a run begins", [])


def test_a_finished_result_names_its_inputs_and_its_size(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    found = status(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert found["state"] == "finished"
    assert found["merges"] == [
        {
            "fingerprint": json.loads((tmp_path / "out" / "streammerge.json").read_text())["fingerprint"],
            "base": str(base),
            "adapters": [str(adapter)],
            "written_bytes": size,
            "bytes": size,
        }
    ]
    words = call("status", tmp_path / "out").out
    assert "a finished result" in words
    assert f"{adapter} into {base}: " in words
    assert "any other is refused without `--overwrite`" in words


@pytest.mark.parametrize("lost", [0, 1])
def test_an_unfinished_run_says_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    base, adapter = inputs_at(tmp_path)
    monkeypatch.setattr(digests, "BLOCK", 4 * 2**20)
    staged(base, adapter, tmp_path / "out", monkeypatch)
    (journal,) = (tmp_path / "out" / STAGING).rglob("journal")
    lines = [line for line in journal.read_bytes().split(b"\n") if line]
    journal.write_bytes(b"\n".join(lines[: len(lines) - lost]))
    found = status(tmp_path / "out")
    assert found["state"] == "unfinished"
    assert not found["at_work"]
    (merge,) = found["merges"]
    assert (merge["base"], merge["adapters"]) == (str(base), [str(adapter)])
    assert (merge["written_bytes"] == merge["bytes"]) == (lost == 0)
    assert "the same merge goes on" in call("status", tmp_path / "out").out
    merged(base, adapter, tmp_path / "out")
    assert status(tmp_path / "out")["state"] == "finished"


def test_a_run_at_work_is_told_from_one_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)
    staged(base, adapter, tmp_path / "out", monkeypatch)
    held = lock(tmp_path / "out" / STAGING / "lock")
    assert held is not None
    assert status(tmp_path / "out")["at_work"]
    assert "a run is at work on it now" in call("status", tmp_path / "out").out
    held.close()
    assert not status(tmp_path / "out")["at_work"]


def test_files_that_are_not_ours_are_said_to_be_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    found = status(tmp_path)
    assert (found["state"], found["next"]) == ("foreign", "every run is refused")
