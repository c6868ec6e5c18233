"""The command that runs all campaigns tells what went wrong, what was not tried, and what could not be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns import rows, torture
from tests.campaigns.rows import Form, Row

REAL = subprocess.run
SAID = {"campaign": "one", "points": 12, "wrong": [], "seconds": 1.0, "kinds": ["EIO"], "ended": {"exit code 3": 2}}


def run(monkeypatch: pytest.MonkeyPatch, said: dict[str, object], least: dict[str, int], *options: str) -> int:
    """`scripts/torture` with one campaign, which says what it is told to."""
    program = f"import json; print(json.dumps({said!r}))"
    form = Form("FOLDER", least)
    monkeypatch.setattr(torture, "ROWS", (Row("one", "one", form, form),))
    monkeypatch.setattr(sys, "argv", ["torture", *options])

    def instead(command: list[str], **given: object) -> object:
        return REAL([sys.executable, "-c", program], **given)

    monkeypatch.setattr(torture.subprocess, "run", instead)
    return torture.main()


def test_a_campaign_that_found_nothing_wrong_and_tried_enough_is_all_right(monkeypatch, capsys):
    assert run(monkeypatch, SAID, {"points": 12, "ended/exit code 3": 2}) == 0
    assert "all right" in capsys.readouterr().out


@pytest.mark.parametrize("least", [{"points": 13}, {"ended/exit code 3": 3}, {"ended/exit code 7": 1}])
def test_a_campaign_that_tried_too_little_has_failed(monkeypatch, capsys, least):
    assert run(monkeypatch, SAID, least) == 1
    assert f"of at least {min(least.values())}" in capsys.readouterr().out


def test_what_went_wrong_is_told_and_is_the_exit_code(monkeypatch, capsys):
    assert run(monkeypatch, SAID | {"wrong": ["killed at 7: a loader takes it"]}, {}) == 1
    out = capsys.readouterr().out
    assert "1 WRONG" in out
    assert "killed at 7: a loader takes it" in out


def test_a_campaign_that_cannot_run_here_says_why_and_fails_nothing(monkeypatch, capsys):
    assert run(monkeypatch, SAID | {"points": 0, "skipped": "it needs root"}, {"points": 1}) == 0
    assert "skipped: it needs root" in capsys.readouterr().out


def test_the_figures_are_kept_beside_those_of_other_days(monkeypatch, tmp_path: Path):
    assert run(monkeypatch, SAID, {}, "--results", str(tmp_path)) == 0
    assert run(monkeypatch, SAID | {"points": 99}, {}, "--long", "--results", str(tmp_path)) == 0
    (kept,) = json.loads((tmp_path / "torture.json").read_text())["rows"]
    assert (kept["points"], kept["command"]) == (99, "scripts/torture --long --only one")
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| one | `scripts/torture --long --only one` | 99 | 0 |" in text
    assert "1 kinds: EIO." in text


def test_every_row_is_a_campaign_that_there_is():
    here = Path(rows.__file__).parent
    assert all((here / f"{row.module}.py").exists() for row in rows.ROWS)
    assert len({row.title for row in rows.ROWS}) == len(rows.ROWS)
