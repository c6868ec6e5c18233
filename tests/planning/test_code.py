"""Python files beside a base: copied and named, or left out and named."""

from __future__ import annotations

import json
from pathlib import Path

import streammerge
from tests.refusals.making import MARKER, call, inputs_at, merged, write_json


def with_code(root: Path) -> tuple[Path, Path]:
    base, adapter = inputs_at(root)
    (base / "sub").mkdir()
    for name in ("modeling.py", "sub/more.PY"):
        (base / name).write_text("x = 1\n")
    config = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**config, "auto_map": {"AutoModel": "modeling.Model"}})
    return base, adapter


def test_code_is_copied_and_named_in_plan_report_and_on_the_way(tmp_path: Path) -> None:
    base, adapter = with_code(tmp_path)
    assert "code      modeling.py is copied; loaders may run it" in call("plan", base, adapter).out
    outcome = merged(base, adapter, tmp_path / "out")
    assert "`modeling.py`, `sub/more.PY`; `--no-code` leaves it out" in outcome.err
    document = json.loads((tmp_path / "out" / MARKER).read_text())
    assert document["code"] == ["modeling.py", "sub/more.PY"]
    assert (tmp_path / "out" / "modeling.py").read_text() == "x = 1\n"


def test_without_code_none_is_in_the_output_and_all_of_it_in_the_report(tmp_path: Path) -> None:
    base, adapter = with_code(tmp_path)
    planned = call("plan", base, adapter, "--no-code").out
    assert "code      modeling.py is left out" in planned
    assert "keeps its `auto_map`, which names code that the output does not have" in planned
    merged(base, adapter, tmp_path / "out", "--no-code")
    document = json.loads((tmp_path / "out" / MARKER).read_text())
    assert document["code"] == []
    assert {name for name, rule in document["left_out"].items() if "--no-code" in rule} == {
        "modeling.py",
        "sub/more.PY",
    }
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.suffix.lower() == ".py"] == []
    assert call("verify", tmp_path / "out", "--full").code == 0


def test_with_and_without_code_are_two_plans(tmp_path: Path) -> None:
    base, adapter = with_code(tmp_path)
    assert streammerge.plan(base, adapter).digest() != streammerge.plan(base, adapter, no_code=True).digest()
    merged(base, adapter, tmp_path / "out")
    assert call("run", base, adapter, "-o", tmp_path / "out", "--no-code").code == 5
