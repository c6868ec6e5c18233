"""Every row of the table of conversion rules acts on a stored name as transformers does, or is listed with the reason.

The names and what they become were taken from transformers by scripts/rule_examples.py: no part of them comes from the
engine under test. A regenerated table with a row that is neither in that file nor among the unreachable ones fails.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from streammerge.names.architectures import architecture_of
from streammerge.names.conversions import Rewritten, shipped
from streammerge.names.operators import OPERATORS

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "streammerge" / "names"
TABLE = json.loads((DATA / "conversions.json").read_bytes())
EXAMPLES = json.loads((HERE / "rule_examples.json").read_bytes())

NO_CLASS = {
    "MtpModel": "The model of speculative decoding is made around another one that is loaded already: it is part of no "
    "model, no config.json names it, and it reads the files of the other one a second time.",
    "PPChart2TableModel": "There is no such class: what a config of pp_chart2table builds is GotOcr2Model.",
    "xCLIPTextModel": "There is no such class: the one that is meant is XCLIPTextModel, with a capital.",
    "xCLIPVisionModel": "There is no such class: the one that is meant is XCLIPVisionModel, with a capital.",
    "mlcd_vision": "There is no such model type: the one of MLCDVisionConfig is mlcd_vision_model.",
}
"""Registry keys that are the name of no class and no model type."""
CLASSES_FIRST = {
    "qwen2_5_omni_thinker": "Both of its classes have rules of their own, and a class goes before its model type.",
    "qwen3_omni_moe_thinker": "Both of its classes have rules of their own, and a class goes before its model type.",
}
"""Model types whose rules every one of their classes does without."""
ANOTHER_TYPE = {
    "mlcd": "MLCDVisionModel has another model type of its own, by which the engine goes. The rule takes off what is "
    "its base-model prefix, and names are compared without that one.",
    "pp_chart2table": "GotOcr2ForConditionalGeneration has another model type of its own, by which the engine goes, "
    "and the rules of that one are the same.",
}
"""Model types that a config.json may have with a class that is another one's."""
UNREACHABLE_KEYS = {**NO_CLASS, **CLASSES_FIRST, **ANOTHER_TYPE}
"""Registry keys that the engine never looks under; a row that is under no other key needs no example."""
UNREACHABLE = {
    (".block_sparse_moe.e_score_correction_bias", "minimax_m2"): "The rule before it under the same key has turned "
    "every `.block_sparse_moe.` into `.mlp.` by then, which gives the same name.",
}
"""Rows, by their only source pattern and their only key, that another one leaves nothing to."""

Identity = tuple[str, int]
"""A transform by its content, and the number of a source pattern in it."""


def identity(row: dict[str, Any], source: int) -> Identity:
    return json.dumps([row["re"], row["to"], row.get("ops"), row.get("offset")]), source


def key_of(example: dict[str, Any]) -> str:
    key: str = example["rule"].partition("[")[0]
    return key


def rows(keys: set[str]) -> dict[Identity, dict[str, Any]]:
    """The transforms under some registry keys, once for each of their source patterns."""
    found = [TABLE["transforms"][at] for key in keys for at in TABLE["rules"][key]]
    return {identity(row, source): row for row in found for source in range(len(row["from"]))}


KEYS = set(TABLE["rules"])
ROWS = rows(KEYS)
SHOWN = {identity(example, example["source"]) for example in EXAMPLES}
EXCUSED = ROWS.keys() - rows(KEYS - UNREACHABLE_KEYS.keys()).keys()
SUPERSEDED = {at for pattern, key in UNREACHABLE for at, row in rows({key}).items() if row["from"] == [pattern]} - {
    at for _, key in UNREACHABLE for at in rows(KEYS - {key})
}


@functools.cache
def rewritten(number: int) -> tuple[Rewritten, str]:
    """What the engine makes of the name of an example, and the base-model prefix of the class in its config."""
    example = EXAMPLES[number]
    architecture = architecture_of(example["config"])
    assert architecture is not None, example["config"]
    stored = [example["stored"], *([example["beside"]] if "beside" in example else [])]
    conversions = shipped().conversions(architecture, example["config"], stored)
    return conversions.rewrite(example["stored"]), architecture.base_prefix


# --- what is shown ---------------------------------------------------------------------------------------------------
def test_every_row_has_an_example_or_a_reason() -> None:
    assert sorted(ROWS.keys() - SHOWN - EXCUSED - SUPERSEDED) == []


def test_every_registry_key_has_an_example_or_a_reason() -> None:
    assert sorted(KEYS - {key_of(example) for example in EXAMPLES}) == sorted(UNREACHABLE_KEYS)


def test_no_row_has_both_and_every_reason_is_for_a_row() -> None:
    assert set() == SHOWN & (EXCUSED | SUPERSEDED)
    assert len(SUPERSEDED) == len(UNREACHABLE)


def test_every_example_is_for_the_rule_that_it_names() -> None:
    wrong = []
    for example in EXAMPLES:
        key, number = key_of(example), int(example["rule"].partition("[")[2][:-1])
        row = TABLE["transforms"][TABLE["rules"][key][number]]
        if identity(example, 0) != identity(row, 0) or example["source"] not in range(len(row["from"])):
            wrong.append(example)
    assert wrong == []


@pytest.mark.skipif(
    os.environ.get("STREAMMERGE_LONG") != "1", reason="builds every model class, minutes: STREAMMERGE_LONG=1 runs it"
)
def test_the_examples_are_what_transformers_gives() -> None:
    if metadata.version("transformers") != TABLE["meta"]["transformers"]:
        pytest.skip(f"the table was made from transformers {TABLE['meta']['transformers']}")
    command = [sys.executable, "scripts/rule_examples.py", "--check"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- what the engine does --------------------------------------------------------------------------------------------
def test_the_class_of_every_example_is_found() -> None:
    found = [architecture_of(example["config"]) for example in EXAMPLES]
    assert [[place.name] if place else None for place in found] == [e["config"]["architectures"] for e in EXAMPLES]


def test_every_rule_acts_on_its_example() -> None:
    assert [e for n, e in enumerate(EXAMPLES) if e["rule"] not in rewritten(n)[0].rules] == []


def test_every_example_gets_the_name_that_transformers_gives_it() -> None:
    wrong = {}
    for number, example in enumerate(EXAMPLES):
        made, base = rewritten(number)
        # Of a name with and without the base-model prefix, transformers takes the one that the model has.
        if example["name"] not in (made.name, f"{base}.{made.name}", made.name.removeprefix(f"{base}.")):
            wrong[example["rule"], example["stored"]] = (made.name, example["name"])
    assert wrong == {}


def test_every_conversion_knows_which_of_its_inputs_a_tensor_is() -> None:
    conversions = [(number, example) for number, example in enumerate(EXAMPLES) if "ops" in example]
    assert len(conversions) >= sum("ops" in row for row in TABLE["transforms"])
    for number, example in conversions:
        made, _ = rewritten(number)
        assert made.converter is not None
        assert (made.converter.key, made.source) == (example["rule"], example["source"])
        assert [[name, dict(arguments)] for name, arguments in made.converter.steps] == example["ops"]
        assert re.search(made.converter.pattern, made.renamed)


def test_a_renaming_of_several_acts_only_beside_the_first_of_them() -> None:
    guarded = [example for example in EXAMPLES if "beside" in example]
    assert guarded
    for example in guarded:
        conversions = shipped().conversions(architecture_of(example["config"]), example["config"], [example["stored"]])
        assert example["rule"] not in conversions.rewrite(example["stored"]).rules


# --- what cannot be shown --------------------------------------------------------------------------------------------
def test_keys_that_are_nothing_are_no_class_no_model_type_and_part_of_no_model() -> None:
    inside = {name for row in TABLE["classes"].values() for _, *names, _ in row.get("subs", ()) for name in names}
    for key in NO_CLASS:
        assert architecture_of({"architectures": [key]}) is None
        assert architecture_of({"model_type": key}) is None
        assert key not in inside | TABLE["classes"].keys() | TABLE["auto"].keys() | set(TABLE["auto"].values())


def test_every_class_of_a_model_type_that_is_passed_over_has_rules_of_its_own() -> None:
    model_types = json.loads((DATA / "architectures.json").read_bytes())["model_types"]
    for key in CLASSES_FIRST:
        assert len(model_types[key]["classes"]) == 2
        assert set(model_types[key]["classes"]) <= KEYS


def test_a_class_under_the_model_type_of_another_gets_the_names_that_transformers_gives() -> None:
    config = {"architectures": ["MLCDVisionModel"], "model_type": "mlcd"}
    architecture = architecture_of(config)
    assert architecture is not None
    name = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    made = shipped().conversions(architecture, config, [name]).rewrite(name)
    assert made.name.removeprefix(f"{architecture.base_prefix}.") == "encoder.layers.0.self_attn.q_proj.weight"
    assert TABLE["rules"]["pp_chart2table"] == TABLE["rules"]["got_ocr2"]
    assert TABLE["rules"]["PPChart2TableModel"] == TABLE["rules"]["GotOcr2Model"]


def test_what_is_superseded_is_renamed_by_the_rule_before() -> None:
    config = {"architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2"}
    name = "model.layers.0.block_sparse_moe.e_score_correction_bias"
    made = shipped().conversions(architecture_of(config), config, [name]).rewrite(name)
    assert (made.name, made.rules) == ("model.layers.0.mlp.e_score_correction_bias", ("minimax_m2[0]",))


# --- operators -------------------------------------------------------------------------------------------------------
def test_every_operator_of_the_table_is_known_and_applied_in_its_tests() -> None:
    used = {name for row in TABLE["transforms"] for name, _ in row.get("ops", ())}
    assert used == OPERATORS.keys()
    tests = (HERE / "test_operators.py").read_text("utf-8")
    assert {name for name in used if f'("{name}", ' in tests} == used
