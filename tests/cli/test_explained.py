"""`inspect --base` and `plan` explain themselves: of every module the parameter, the rule, the file and the region; of
what has no place, what was tried; and what there is to say about the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge import api
from tests.refusals.making import (
    HIDDEN,
    INNER,
    PREFIX,
    RANK,
    TARGETS,
    VOCABULARY,
    Stored,
    all_factors,
    base_tensors,
    call,
    factors,
    inputs_at,
    make_adapter,
    make_base,
    normal,
    stored,
)

EXPERTS = 4
MOE = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": EXPERTS}
SPARSE = "model.layers.0.block_sparse_moe.experts"
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_key_value_heads": 1}
NEOX = {"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}
LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama", "hidden_size": HIDDEN},
}
UNKNOWN = {"architectures": ["NewForCausalLM"], "model_type": "new"}


def moe_at(root: Path) -> tuple[Path, Path]:
    """A base with its experts one by one in three files, and an adapter on the experts that transformers stacks."""
    shapes = {"w1": (INNER, HIDDEN), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
    tensors = {
        f"{SPARSE}.{e}.{w}.weight": normal(f"{e}{w}", *shape, dtype="BF16")
        for e in range(EXPERTS)
        for w, shape in shapes.items()
    }
    rank, path = EXPERTS * RANK, f"{PREFIX}model.layers.0.mlp.experts"
    pairs = {
        f"{path}.base_layer.lora_A.weight": normal("gate_up A", rank, HIDDEN),
        f"{path}.base_layer.lora_B.weight": normal("gate_up B", 2 * INNER, rank),
        f"{path}.lora_A.weight": normal("down A", rank, INNER),
        f"{path}.lora_B.weight": normal("down B", HIDDEN, rank),
    }
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(root / "adapter", pairs, target_modules=[], target_parameters=parameters)
    return make_base(root / "base", tensors, shards=3, changes=MOE), adapter


def inspected(adapter: Path, base: Path, code: int = 0) -> dict[str, Any]:
    outcome = call("inspect", adapter, "--base", base, "--json")
    assert outcome.code == code, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    assert found["version"] == 2
    return found


def lines_of(adapter: Path, base: Path, code: int = 0) -> list[str]:
    outcome = call("inspect", adapter, "--base", base)
    assert outcome.code == code, outcome.err
    return outcome.out.splitlines()


def test_stacked_experts_on_a_base_that_stores_them_one_by_one_are_one_line(tmp_path: Path) -> None:
    base, adapter = moe_at(tmp_path)
    lines = lines_of(adapter, base)
    assert lines[:2] == ["LORA adapter, 4 tensors, 2 modules", f"names found: 2 modules: 2 exact ({', '.join(ROWS)})"]
    at = lines.index("  is  model.layers.0.mlp.experts.gate_up_proj (exact, mixtral[0] mixtral[1])")
    assert lines[at - 1].startswith("model.layers.0.mlp.experts: rank 2, alpha 4, scaling 2, norm of delta ")
    assert lines[at + 1] == f"  ->  8 tensors: {SPARSE}.{{0..3}}.{{w1,w3}}.weight in 3 files"
    at = lines.index("  is  model.layers.0.mlp.experts.down_proj (exact, mixtral[0] mixtral[2])")
    assert lines[at + 1] == f"  ->  4 tensors: {SPARSE}.{{0..3}}.w2.weight in 3 files"
    assert len(lines) == 2 + 2 * 4


def test_without_a_base_stacked_experts_have_the_same_rank_and_norm(tmp_path: Path) -> None:
    base, adapter = moe_at(tmp_path)
    alone = json.loads(call("inspect", adapter, "--json").out)["modules"]
    known = inspected(adapter, base)["modules"]
    figures = [sorted((m["rank"], m["alpha"], m["scaling"]) for m in modules) for modules in (alone, known)]
    assert figures[0] == figures[1] == [(RANK, 4, 2.0)] * 2
    norms = [sorted(module["norm"] for module in modules) for modules in (alone, known)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_without_a_base_experts_of_several_ranks_have_none_that_is_known(tmp_path: Path) -> None:
    _, adapter = moe_at(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"gate_up_proj": 2 * RANK}}))
    modules = json.loads(call("inspect", adapter, "--json").out)["modules"]
    assert [(module["rank"], module["norm"]) for module in modules] == [(None, None)] * 2


ROWS = ("mixtral[0]", "mixtral[1]", "mixtral[2]")


def test_the_document_of_stacked_experts_has_every_piece_with_its_file(tmp_path: Path) -> None:
    base, adapter = moe_at(tmp_path)
    by_name = {module["canonical"]: module for module in inspected(adapter, base)["modules"]}
    assert set(by_name) == {f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    module = by_name["model.layers.0.mlp.experts.gate_up_proj"]
    assert module["keys"] == [f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_{half}.weight" for half in "AB"]
    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    whole = {"matrix": None, "rows": [0, INNER, 1, 1, 0], "cols": [0, HIDDEN, 1, 1, 0], "indices": [], "origin": None}
    expected = [
        {"tensor": name, "file": weight_map[name], "transposed": False, **whole}
        for name in sorted(weight_map)
        if ".w2." not in name
    ]
    assert sorted(module["targets"], key=lambda target: str(target["tensor"])) == expected
    # The delta of all experts together: A's rows belong to the experts one after the other, B's columns in turn.
    a, b = normal("gate_up A", EXPERTS * RANK, HIDDEN), normal("gate_up B", 2 * INNER, EXPERTS * RANK)
    left, right = (np.frombuffer(x.data, np.float32).reshape(x.shape).astype(np.float64) for x in (b, a))
    deltas = [left[:, e::EXPERTS] @ right[e * RANK : (e + 1) * RANK] for e in range(EXPERTS)]
    assert abs(module["norm"] - 2 * np.linalg.norm(deltas)) < 1e-4 * module["norm"]
    assert module["rank"] == RANK


def test_the_plan_counts_modules_by_rule_and_lists_them_when_asked(tmp_path: Path) -> None:
    base, adapter = moe_at(tmp_path)
    short, long = call("plan", base, adapter).out, call("plan", base, adapter, "-v").out
    assert f"\nnames     2 modules: 2 exact ({', '.join(ROWS)})\n" in short
    assert "  ->  " not in short
    assert f"\n  ->  8 tensors: {SPARSE}.{{0..3}}.{{w1,w3}}.weight in 3 files\n" in long
    operations = [op for tensor in json.loads(call("plan", base, adapter, "--json").out)["tensors"]
                  for op in tensor["operations"]]  # fmt: skip
    assert len(operations) == 3 * EXPERTS
    assert {(op["parameter"].rpartition(".")[2], op["part"], op["rule"]) for op in operations} == {
        ("gate_up_proj", True, "exact, mixtral[0] mixtral[1]"),
        ("down_proj", False, "exact, mixtral[0] mixtral[2]"),
    }


def test_a_part_of_a_fused_module_is_shown_with_its_rows(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors = {name: normal("qkv", 2 * HIDDEN, HIDDEN, dtype="BF16")}  # 2 heads of 8, one key and one value head
    base = make_base(tmp_path / "base", tensors, shards=1, changes=PHI3)
    module = "model.layers.0.self_attn.k_proj"
    adapter = make_adapter(tmp_path / "adapter", factors(module, out=HIDDEN // 2))
    lines = lines_of(adapter, base)
    assert lines[1] == "names found: 1 module: 1 fused"
    assert lines[-2] == f"  is  {module}.weight (fused: part 2 of 3 of `self_attn.qkv_proj`)"
    assert lines[-1] == f"  ->  {name}, rows 16..23, in model.safetensors"
    (target,) = inspected(adapter, base)["modules"][0]["targets"]
    assert (target["tensor"], target["rows"]) == (name, [HIDDEN, HIDDEN // 2, 1, 1, 0])


def test_a_part_that_alternates_with_others_is_shown_with_its_distance(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    tensors = {name: normal("qkv", 3 * HIDDEN, HIDDEN, dtype="BF16")}
    base = make_base(tmp_path / "base", tensors, shards=1, changes=NEOX)
    adapter = make_adapter(tmp_path / "adapter", factors("gpt_neox.layers.0.attention.k_proj"))
    assert lines_of(adapter, base)[-1] == f"  ->  {name}, rows 8..15 of every 24, in model.safetensors"
    assert inspected(adapter, base)["modules"][0]["targets"][0]["rows"] == [8, 8, 1, 2, 24]


def test_an_adapter_of_another_release_is_shown_with_the_rows_of_the_table(tmp_path: Path) -> None:
    stored_name = "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors = {stored_name: normal("q", HIDDEN, HIDDEN, dtype="BF16")}
    base = make_base(tmp_path / "base", tensors, shards=1, changes=LLAVA)
    canonical = "model.language_model.layers.0.self_attn.q_proj"
    adapter = make_adapter(tmp_path / "adapter", factors(canonical))
    lines = lines_of(adapter, base)
    assert lines[-2].startswith(f"  is  {canonical}.weight (exact, llava[")
    assert lines[-1] == f"  ->  {stored_name} in model.safetensors"
    assert lines[1].startswith("names found: 1 module: 1 exact (llava[")


def test_a_base_of_an_unknown_type_says_that_no_row_of_the_table_was_used(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", changes=UNKNOWN)
    names = [name.removeprefix("model.") for name in TARGETS]
    pairs = {key.replace(f"{PREFIX}model.", PREFIX): value for key, value in all_factors().items()}
    adapter = make_adapter(tmp_path / "adapter", pairs)
    note = "`NewForCausalLM` is not in the table of architectures: names were joined as they are and by prefixes, "
    note += "without knowledge of ties; no row of the table was used"
    lines = lines_of(adapter, base)
    assert lines[1:3] == ["names found: 4 modules: 4 prefix-solver", f"note: {note}"]
    assert f"  is  {TARGETS[0]}.weight (prefix-solver: `` -> `model`)" in lines
    assert f"\nnote      {note}\n" in call("plan", base, adapter).out
    status = inspected(adapter, base)
    assert status["notes"] == [note]
    assert [module["module"] for module in status["modules"]] == sorted(names)
    # Also where nothing else can be said of the base.
    lost = make_adapter(tmp_path / "lost", factors("elsewhere.q_proj"))
    assert inspected(lost, base, 4)["notes"] == [note]


# --- what has no place ------------------------------------------------------------------------------------------------
def test_every_unresolved_key_is_shown_with_what_was_tried_and_the_others_with_their_place(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    lost = "model.layers.7.self_attn.q_proj"
    adapter = make_adapter(tmp_path / "adapter", all_factors() | factors(lost))
    lines = lines_of(adapter, base, 4)
    assert lines[1] == "names found: 4 modules: 4 exact"
    for name in TARGETS:
        assert f"  is  {name}.weight (exact)" in lines
    at = next(number for number, line in enumerate(lines) if line.startswith(f"{lost}: rank 2, "))
    assert lines[at + 1] == "  !!  matches no tensor in the base"
    at = lines.index("keys without a tensor in the base:")
    assert lines[at + 1 : at + 4] == [
        f"  {PREFIX}{lost}.lora_A.weight",
        f"  {PREFIX}{lost}.lora_B.weight",
        f"    tried    {lost}.weight (exact)",
    ]
    assert "    nearest  model.layers.0.self_attn.q_proj.weight" in lines[at:]
    status = inspected(adapter, base, 4)
    assert [item["key"] for item in status["refusal"]["unmatched"]] == [line.strip() for line in lines[at + 1 : at + 3]]
    assert status["refusal"]["error"] == "UnmatchedKeysError"
    assert len(status["refusals"]) == 1
    problems = {module["module"]: (module["problem"], len(module["targets"])) for module in status["modules"]}
    assert problems == {**dict.fromkeys(TARGETS, (None, 1)), lost: ("matches no tensor in the base", 0)}


def test_inspection_goes_on_behind_every_refusal_and_ends_with_the_first(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    narrow, missing, broken, good = TARGETS[0], "model.layers.9.mlp.up_proj", TARGETS[1], TARGETS[2]
    pairs: dict[str, Stored] = all_factors([good, broken]) | factors(narrow, out=HIDDEN - 1) | factors(missing)
    pairs[f"{PREFIX}{broken}.lora_B.weight"] = stored(np.full((HIDDEN, RANK), np.nan))
    adapter = make_adapter(tmp_path / "adapter", pairs)
    outcome = call("inspect", adapter, "--base", base, "--json")
    assert outcome.code == 4
    assert outcome.err.startswith(f"error: the adapter tensor `{PREFIX}{broken}.lora_B.weight` is not finite")
    status = json.loads(outcome.out)
    kinds = [refusal["error"] for refusal in status["refusals"]]
    assert kinds == ["NonFiniteError", "ShapeMismatchError", "UnmatchedKeysError"]
    assert status["refusal"] == status["refusals"][0]
    by_name = {module["module"]: module for module in status["modules"]}
    assert [name for name, module in by_name.items() if module["targets"]] == [good]
    assert "is not finite" in by_name[broken]["problem"]
    assert "in the base has shape [16, 16]" in by_name[narrow]["problem"]
    assert by_name[missing]["problem"] == "matches no tensor in the base"


def test_a_refusal_of_the_adapter_as_a_whole_leaves_the_table_of_its_factors(tmp_path: Path) -> None:
    pairs = {key: stored(np.zeros(x.shape)) if "lora_B" in key else x for key, x in all_factors().items()}
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", pairs)
    lines = lines_of(adapter, base, 4)
    assert lines[2].split() == ["module", "rank", "alpha", "scaling", "norm", "of", "delta"]
    assert len(lines) == 3 + len(TARGETS)


def test_what_follows_only_from_setting_keys_aside_is_no_refusal_of_the_adapter(tmp_path: Path) -> None:
    pairs = {key: stored(np.zeros(x.shape)) if "lora_B" in key else x for key, x in all_factors().items()}
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", pairs | factors("model.layers.7.self_attn.q_proj"))
    status = inspected(adapter, base, 4)  # without the one module that is not zero there is no effect
    assert [refusal["error"] for refusal in status["refusals"]] == ["UnmatchedKeysError"]


def test_keys_that_a_rule_lets_go_are_said_to_be(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    lost = "model.layers.7.self_attn.q_proj"
    make_adapter(adapter, all_factors() | factors(lost))
    status = api.inspect(adapter, base, allow_unused=("*layers.7*",))
    assert status.refusal is None
    assert list(status.ignored) == [f"{PREFIX}{lost}.lora_{half}.weight" for half in "AB"]
    (module,) = (module for module in status.modules if not module.targets)
    assert (module.module, module.problem) == (lost, "not used: allowed to be left over by --allow-unused")


def test_a_bias_belongs_to_its_module_whose_norm_is_that_of_the_weight(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.bias": normal("b", HIDDEN, dtype="BF16"),
        f"{name}.weight": normal("w", HIDDEN, HIDDEN, dtype="BF16"),
    }
    base = make_base(tmp_path / "base", tensors, shards=2)
    plain = make_adapter(tmp_path / "plain", factors(name))
    pairs = factors(name) | {f"{PREFIX}{name}.lora_B.bias": normal("delta", HIDDEN)}
    adapter = make_adapter(tmp_path / "adapter", pairs, lora_bias=True)
    (module,) = inspected(adapter, base)["modules"]
    assert (module["canonical"], len(module["keys"])) == (f"{name}.weight", 3)
    assert [(target["tensor"], target["cols"]) for target in module["targets"]] == [
        (f"{name}.weight", [0, HIDDEN, 1, 1, 0]),
        (f"{name}.bias", [0, 1, 1, 1, 0]),
    ]
    assert module["norm"] == inspected(plain, base)["modules"][0]["norm"]
    assert lines_of(adapter, base)[-1] == (
        f"  ->  2 tensors: {name}.{{weight,bias}} in model-00002-of-00002.safetensors and "
        "model-00001-of-00002.safetensors"
    )


def test_the_side_of_a_tie_that_the_base_does_not_store_is_shown_with_the_side_that_it_is_made_of(
    tmp_path: Path,
) -> None:
    tensors = base_tensors(head=False)
    base = make_base(tmp_path / "base", tensors, changes={"tie_word_embeddings": True})
    pairs = factors("lm_head", out=VOCABULARY)
    adapter = make_adapter(tmp_path / "adapter", pairs)
    (module,) = inspected(adapter, base)["modules"]
    (target,) = module["targets"]
    file = "model-00001-of-00002.safetensors"
    assert (target["tensor"], target["origin"], target["file"]) == ("lm_head.weight", "model.embed_tokens.weight", file)
    assert lines_of(adapter, base)[-1] == f"  ->  lm_head.weight, made of model.embed_tokens.weight, in {file}"
    head = {f"{PREFIX}score.weight": normal("score", 2, HIDDEN)}
    adapter = make_adapter(tmp_path / "head", all_factors() | head, task_type="SEQ_CLS")
    assert "  ->  score.weight (new)" in lines_of(adapter, base)


def test_rows_of_tokens_are_shown_by_their_numbers(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    pairs = all_factors() | {key: normal("rows", 2, HIDDEN)}
    adapter = make_adapter(tmp_path / "adapter", pairs, trainable_token_indices={"embed_tokens": [3, 17]})
    lines = lines_of(adapter, base)
    assert any(line.startswith("  ->  model.embed_tokens.weight, rows 3, 17, in model-0000") for line in lines)
    (module,) = (module for module in inspected(adapter, base)["modules"] if module["keys"] == [key])
    assert module["targets"][0]["indices"] == [3, 17]


def test_a_replaced_parameter_is_shown_as_modules_are(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    key = f"{PREFIX}model.norm.weight"
    adapter = make_adapter(tmp_path / "adapter", all_factors() | {key: normal("norm", HIDDEN, dtype="BF16")})
    lines = lines_of(adapter, base)
    at = lines.index("model.norm.weight: replacement")
    assert lines[at + 1] == "  is  model.norm.weight (exact)"
    assert lines[at + 2].startswith("  ->  model.norm.weight in model-0000")
    (module,) = (m for m in inspected(adapter, base)["modules"] if m["kind"] == "replacement")
    assert (module["keys"], module["rule"], module["canonical"]) == ([key], "exact", "model.norm.weight")
    plan = json.loads(call("plan", base, adapter, "--json").out)
    source = next(tensor["source"] for tensor in plan["tensors"] if tensor["name"] == "model.norm.weight")
    assert source == {
        "adapter": 0, "key": key, "module": "model.norm.weight", "rule": "exact", "parameter": "model.norm.weight",
    }  # fmt: skip
