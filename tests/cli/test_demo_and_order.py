"""The demonstration runs to its end on its own files, and arguments may come in the orders that people type."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.refusals.making import MARKER, call, inputs_at


def test_the_demo_builds_plans_merges_and_verifies_and_shows_the_commands(tmp_path: Path) -> None:
    outcome = call("demo", tmp_path / "demo")
    assert outcome.code == 0, outcome.err
    for command in ("inspect", "plan", "run", "verify"):
        assert f"$ streammerge {command} " in outcome.out
    assert "8 of 39 tensors changed" in outcome.out
    assert call("verify", tmp_path / "demo" / "merged", "--full").code == 0


def test_the_demo_does_not_touch_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    outcome = call("demo", tmp_path)
    assert outcome.code == 5
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "order",
    [
        ("run", "{base}", "{adapter}", "-o", "{out}"),
        ("run", "-o", "{out}", "{base}", "{adapter}"),
        ("run", "-q", "{base}", "{adapter}", "--output={out}", "--weight=-1"),
        ("run", "--weight", "2", "-o", "{out}", "--", "{base}", "{adapter}"),
    ],
    ids=str,
)
def test_options_may_stand_before_or_after_the_paths(tmp_path: Path, order: tuple[str, ...]) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call(*(word.format(base=base, adapter=adapter, out=tmp_path / "out") for word in order))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "out" / MARKER).exists()


def test_an_adapter_that_is_cut_off_by_an_option_is_not_lost_in_silence(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    outcome = call("run", base, adapter, "-o", tmp_path / "out", "--weight", "1", adapter)
    assert outcome.code == 2
    assert str(adapter) in outcome.err
    assert not (tmp_path / "out").exists()
