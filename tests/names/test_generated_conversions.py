"""The shipped table of conversion rules is what its generator makes of the installed transformers.

The rules are made anew in seconds. The classes, for which every model is built without weights, take minutes: they are
compared where STREAMMERGE_LONG=1 says so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "streammerge" / "names" / "conversions.json"
SHIPPED = json.loads(DATA.read_bytes())
KINDS = {"rename", "convert", "group", "offset"}
long_form = pytest.mark.skipif(
    os.environ.get("STREAMMERGE_LONG") != "1", reason="builds every model class, minutes: STREAMMERGE_LONG=1 runs it"
)


def reference() -> None:
    """Skips with another version than the one the table was made from; what that one does, the table does not claim."""
    transformers = pytest.importorskip("transformers")
    made = SHIPPED["meta"]["transformers"]
    if transformers.__version__ != made:
        pytest.skip(f"the table was made from transformers {made}, installed is {transformers.__version__}")


def generated(program: str) -> Any:
    """What `program` prints last, run beside the generator."""
    done = subprocess.run(
        [sys.executable, "-c", f"import json, generate_conversions as g\n{program}"],
        cwd=ROOT / "scripts",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def transforms(key: str) -> list[dict[str, Any]]:
    return [SHIPPED["transforms"][at] for at in SHIPPED["rules"][key]]


def test_the_generator_gives_the_shipped_rules() -> None:
    reference()
    made = generated("print(json.dumps(g.table({}) | {'text': g.rendered(g.table({})).decode()}))")
    for section in ("meta", "transforms", "rules", "auto"):
        assert made[section] == SHIPPED[section], section
    text, shipped = made["text"], DATA.read_text("ascii")
    cut = text.index('"classes": {\n') + len('"classes": {\n')
    assert shipped[:cut] == text[:cut]
    assert shipped[shipped.index('\n},\n"auto"') :] == text[text.index('\n},\n"auto"') :]


@long_form
def test_the_generator_gives_the_shipped_classes() -> None:
    reference()
    command = [sys.executable, "scripts/generate_conversions.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_few_classes_are_what_the_generator_makes_of_them() -> None:
    reference()
    names = ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "DeepseekV4ForCausalLM", "LlamaModel"]
    made = generated(
        "import meta_models as m\n"
        f"found = m.concrete_classes(('llava', 'qwen2_vl', 'deepseek_v4', 'llama', 'clip'))\n"
        f"m.concrete_classes = lambda: {{name: found[name] for name in {names!r}}}\n"
        "print(json.dumps(m.class_rows(g.registry_sections()['rules'])))"
    )
    assert made == {name: SHIPPED["classes"][name] for name in names if name in SHIPPED["classes"]}
    assert made.keys() == set(names) - {"LlamaModel"}


def test_every_transform_is_used_and_every_index_is_one() -> None:
    used = {at for indices in SHIPPED["rules"].values() for at in indices}
    assert used == set(range(len(SHIPPED["transforms"])))
    assert len({json.dumps(row) for row in SHIPPED["transforms"]}) == len(SHIPPED["transforms"])


def test_every_transform_compiles_and_says_what_its_kind_needs() -> None:
    for row in SHIPPED["transforms"]:
        groups = re.compile(row["re"]).groupindex
        assert set(groups) == {f"g{number}" for number in range(len(row["from"]))}
        assert row["kind"] in KINDS
        assert ("ops" in row) is (row["kind"] == "convert")
        assert ("offset" in row) is (row["kind"] == "offset")
        assert len(row["to"]) == 1 or row["kind"] in ("convert", "group")


def test_the_rows_of_a_mixture_of_experts_stack_and_join_its_experts() -> None:
    gate_up, down = transforms("qwen2_moe")
    assert gate_up["from"] == ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"]
    assert gate_up["to"] == ["mlp.experts.gate_up_proj"]
    assert gate_up["ops"] == [["MergeModulelist", {}], ["Concatenate", {"dim": 1}]]
    assert down["ops"] == [["MergeModulelist", {}]]
    assert SHIPPED["rules"]["qwen3_moe"] == SHIPPED["rules"]["qwen2_moe"]


def test_a_prefix_that_may_be_missing_is_marked() -> None:
    (row,) = transforms("CLIPVisionModel")
    assert row["prefix"] is True
    assert re.sub(row["re"], "x", "vision_model.encoder") == "x"


def test_what_transformers_takes_from_the_live_model_stands_in_the_table() -> None:
    sizes = [op[1]["sizes"] for row in transforms("Molmo2TextModel") for op in row.get("ops", ()) if op[0] == "Split"]
    assert sizes == [["H*D", "KV*D", "KV*D"]]
    assert [row["ops"][0][1]["rows"] for row in transforms("qwen3_vl_moe")] == ["2*M", "hid"]


def test_the_sizes_are_those_of_the_parameters_of_the_live_model() -> None:
    reference()
    made = generated(
        "import torch, transformers as t\n"
        "text = dict(vocab_size=8, hidden_size=40, intermediate_size=24, moe_intermediate_size=12, head_dim=6,\n"
        "            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_experts=3)\n"
        "def shapes(cls, config_class, *names):\n"
        "    config = config_class(**{k: v for k, v in text.items() if hasattr(config_class(), k)})\n"
        "    with torch.device('meta'):\n"
        "        state = cls(config).state_dict()\n"
        "    return [list(next(v.shape for k, v in state.items() if k.endswith(n))) for n in names]\n"
        "from transformers.models.molmo2 import modeling_molmo2 as m, configuration_molmo2 as mc\n"
        "from transformers.models.qwen3_vl_moe import modeling_qwen3_vl_moe as q, configuration_qwen3_vl_moe as qc\n"
        "print(json.dumps(["
        "shapes(m.Molmo2TextModel, mc.Molmo2TextConfig, 'q_proj.weight', 'k_proj.weight', 'v_proj.weight'),"
        "shapes(q.Qwen3VLMoeTextModel, qc.Qwen3VLMoeTextConfig, 'gate_up_proj', 'experts.down_proj')]))"
    )
    letters = {"hid": 40, "H": 4, "KV": 2, "D": 6, "I": 24, "M": 12}
    (split,) = [op[1] for row in transforms("Molmo2TextModel") for op in row.get("ops", ()) if op[0] == "Split"]
    assert [product(size, letters) for size in split["sizes"]] == [shape[0] for shape in made[0]]
    rows = [row["ops"][0][1]["rows"] for row in transforms("qwen3_vl_moe")]
    assert [product(size, letters) for size in rows] == [shape[1] for shape in made[1]]


def product(size: str, letters: dict[str, int]) -> int:
    result = 1
    for factor in size.split("*"):
        result *= int(factor) if factor.isdigit() else letters[factor]
    return result


def test_the_file_is_small_and_has_one_row_a_line() -> None:
    lines = DATA.read_bytes().splitlines()
    assert sum(map(len, lines)) < 400_000
    sections = [SHIPPED[name] for name in ("transforms", "rules", "classes", "auto")]
    assert len(lines) == sum(map(len, sections)) + 3 + 2 * len(sections)


def test_a_tower_of_a_composite_model_is_found_where_its_config_stands() -> None:
    subs = SHIPPED["classes"]["LlavaForConditionalGeneration"]["subs"]
    assert subs == [
        ["model", "LlavaModel", "llava", ""],
        ["model.vision_tower", "CLIPVisionModel", "clip_vision_model", "vision_config"],
        ["model.language_model", "LlamaModel", "llama", "text_config"],
    ]
