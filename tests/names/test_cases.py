"""Every case of the data files: the plan has exactly the operations that the file lists, or is refused as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import streammerge
from streammerge.core import errors
from tests.names.case_files import Case, Target, parse, read_cases, target_of, write

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


def test_there_are_cases_of_many_models() -> None:
    assert len(CASES) >= 120
    assert len({case.name for case in CASES}) == len(CASES)


GOOD = """
[base.tensors]
"model.layers.{0..1}.q.weight" = [4, 4]
[[case]]
name = "a case"
lora = { "base_model.model.model.layers.{0..1}.q" = [2, 4, 4] }
[[case.target]]
each = { l = "0..1" }
module = "model.layers.{l}.q"
tensor = "model.layers.{l}.q.weight"
rule = "exact"
"""


def test_names_are_expanded_on_both_sides() -> None:
    (case,) = parse("file", GOOD)
    assert list(case.tensors) == [f"model.layers.{n}.q.weight" for n in (0, 1)]
    assert case.keys["base_model.model.model.layers.1.q.lora_B.weight"] == (4, 2)
    assert case.targets == tuple(Target(f"model.layers.{n}.q", f"model.layers.{n}.q.weight", "exact") for n in (0, 1))


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        ('rule = "exact"', 'rule = "exact"\nrow = "0:4"', "row"),
        ('name = "a case"', 'name = "a case"\nnote = "x"', "note"),
        ("[base.tensors]", "[base]\nconfigs = {}\n[base.tensors]", "configs"),
        ("[base.tensors]", "[bases]\n[base.tensors]", "bases"),
        ("[[case.target]]", '[case.refused]\nerror = "X"\nsays = []\n[[case.target]]', "either targets or a refusal"),
        ("[4, 4]", '[4, 4]\n"model.layers.1.{q,q}.weight" = [4, 4]', "there twice"),
    ],
)
def test_a_file_with_a_field_that_is_not_known_is_refused(old: str, new: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        list(parse("file", GOOD.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('each = { l = "0..1" }', 'each = { l = "0..0" }'),
        ('each = { l = "0..1" }', 'each = { l = "0..2" }'),
        ('rule = "exact"', 'rule = "exact, mixtral"'),
        ('rule = "exact"', 'rule = "exact"\nrows = "0:2"'),
        ('rule = "exact"', 'rule = "exact"\ntransposed = true'),
        ('rule = "exact"', 'rule = "exact"\nout = "0:2"'),
        ('name = "a case"', 'name = "a case"\nnew = ["lm_head.weight"]'),
        ('name = "a case"', 'name = "a case"\nedits = { vocab_size = 5 }'),
        ('name = "a case"', 'name = "a case"\nnotes = ["something else"]'),
        ('name = "a case"', 'name = "a case"\nreplaced = { "a" = "b" }'),
    ],
)
def test_a_case_that_claims_less_more_or_other_than_the_plan_fails(old: str, new: str, tmp_path: Path) -> None:
    for number, text in enumerate((GOOD, GOOD.replace(old, new))):
        (case,) = parse("file", text)
        folder = tmp_path / str(number)
        folder.mkdir()
        if text == GOOD:
            test_the_plan_is_what_the_file_says(case, folder)
        else:
            with pytest.raises(AssertionError):
                test_the_plan_is_what_the_file_says(case, folder)
