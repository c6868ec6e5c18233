"""Every case of the data files: the plan has exactly the operations that the file lists, or is refused as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge
from streammerge.core import errors
from tests.names.case_files import Case, parse, read_cases, target_of, write

CASES = read_cases()


def planned(case: Case, root: Path) -> streammerge.MergePlan:
    files = write(case, root)
    options = dict(case.options)
    if case.rules:
        (root / "rules.json").write_text(case.rules)
        options["rules"] = str(root / "rules.json")
    return streammerge.plan(files.base, files.adapter, **options)


@pytest.mark.parametrize("case", [case for case in CASES if not case.refused], ids=lambda case: case.name)
def test_the_plan_is_what_the_file_says(case: Case, tmp_path: Path) -> None:
    plan = planned(case, tmp_path)
    made = [target_of(op, case.keys) for tensor in plan.tensors.values() for op in tensor.operations]
    assert sorted(map(repr, made)) == sorted(map(repr, case.targets))
    replaced = {name: t.source.key for name, t in plan.tensors.items() if hasattr(t.source, "key")}
    assert replaced == dict(case.replaced)
    assert sorted(plan.tensors.keys() - case.tensors.keys()) == sorted(case.new)
    assert {".".join(path): value for path, value in plan.config_edits} == dict(case.edits)
    for part in case.notes:
        assert any(part in note for note in plan.notes), plan.notes


@pytest.mark.parametrize("case", [case for case in CASES if case.refused], ids=lambda case: case.name)
def test_the_refusal_is_what_the_file_says(case: Case, tmp_path: Path) -> None:
    with pytest.raises(getattr(errors, case.refused["error"])) as caught:
        planned(case, tmp_path)
    error = caught.value
    assert type(error).__name__ == case.refused["error"]
    assert error.exit_code == case.refused.get("exit_code", 4)
    text = "\n".join((error.summary(), *error.details(), error.hint()))
    for part in case.refused["says"]:
        assert part in text
