"""A table of rules of the user's own is an input like base and adapter: commands take it, and `verify` finds it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.refusals.making import HIDDEN, PREFIX, RANK, call, factors, make_adapter, make_base, merged, normal

RENAME = {
    "from": ["mixer.input"],
    "kind": "rename",
    "re": r"(?P<g0>mixer.input(?!\w))",
    "to": ["mixer.in_proj"],
}
TABLE = {
    "meta": {"format": 1, "transformers": "9.0"},
    "transforms": [RENAME],
    "rules": {"inventor": [0]},
    "classes": {},
    "auto": {},
}


def inputs_at(root: Path) -> tuple[Path, Path, Path]:
    """A base of an invented model type, an adapter in that model's names, and the table that joins them."""
    tensors = {"model.layers.0.mixer.input.weight": normal("input", HIDDEN, HIDDEN, dtype="BF16")}
    changes = {"architectures": ["InventorForCausalLM"], "model_type": "inventor"}
    rules = root / "rules.json"
    rules.write_text(json.dumps(TABLE))
    base = make_base(root / "base", tensors, shards=1, changes=changes)
    return base, make_adapter(root / "adapter", factors("model.layers.0.mixer.in_proj")), rules


def test_an_output_made_with_a_table_of_rules_is_verified_with_it(tmp_path: Path) -> None:
    base, adapter, rules = inputs_at(tmp_path)
    assert call("run", base, adapter, "-o", tmp_path / "none").code == 4
    merged(base, adapter, tmp_path / "out", "--rules", rules)
    outcome = call("verify", tmp_path / "out", "--full")
    assert outcome.code == 0, outcome.err
    assert "derived again" in outcome.out


def test_a_table_of_rules_that_has_moved_is_missed_by_name_and_may_be_given(tmp_path: Path) -> None:
    base, adapter, rules = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out", "--rules", rules)
    moved = rules.rename(tmp_path / "moved.json")
    outcome = call("verify", tmp_path / "out")
    assert (outcome.code, "derived again" in outcome.out) == (0, False)
    assert f"`{rules}`, which the output was made from, is gone" in outcome.err
    outcome = call("verify", tmp_path / "out", "--full")
    assert outcome.code == 3
    assert str(rules) in outcome.err
    assert call("verify", tmp_path / "out", "--full", "--base", base, "--adapter", adapter, "--rules", moved).code == 0


def test_inspect_takes_what_a_run_takes_to_find_its_targets(tmp_path: Path) -> None:
    base, adapter, rules = inputs_at(tmp_path)
    assert call("inspect", adapter, "--base", base).code == 4
    outcome = call("inspect", adapter, "--base", base, "--rules", rules)
    assert outcome.code == 0, outcome.err
    assert "(exact, inventor[0])" in outcome.out


def test_inspect_can_be_told_which_way_square_experts_lie(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.experts.down_proj": normal("down", 2, HIDDEN, HIDDEN, dtype="BF16")}
    changes = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    base = make_base(tmp_path / "base", tensors, shards=1, changes=changes)
    path = f"{PREFIX}model.layers.0.mlp.experts"
    pair = {
        f"{path}.lora_A.weight": normal("A", 2 * RANK, HIDDEN),
        f"{path}.lora_B.weight": normal("B", HIDDEN, 2 * RANK),
    }
    config = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "peft_version": "0.21.2"}
    adapter = make_adapter(tmp_path / "adapter", pair, **config)
    outcome = call("inspect", adapter, "--base", base)
    assert (outcome.code, "--expert-orientation" in outcome.err) == (4, True)
    outcome = call("inspect", adapter, "--base", base, "--expert-orientation", "transposed")
    assert outcome.code == 0, outcome.err
