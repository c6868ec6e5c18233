"""The rules that hold for a config are those transformers collects for the model it builds, in its order and scopes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from streammerge.core.errors import MalformedInputError
from streammerge.names.architectures import architecture_of
from streammerge.names.conversions import Conversions, Scoped, Table, Transform, load, load_checked, shipped
from tests.names.test_generated_conversions import reference

ONE_LAYER = {"num_hidden_layers": 1}
TEXT = {"text_config": ONE_LAYER}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", ONE_LAYER),
    "mixtral": ("MixtralForCausalLM", ONE_LAYER),
    "qwen3_moe": ("Qwen3MoeForCausalLM", ONE_LAYER),
    "deepseek_v3": ("DeepseekV3ForCausalLM", ONE_LAYER),
    "phimoe": ("PhimoeForCausalLM", ONE_LAYER),
    "gpt_neox": ("GPTNeoXForCausalLM", ONE_LAYER),
    "gpt_neox-headless": ("GPTNeoXModel", ONE_LAYER),
    "clip": ("CLIPModel", {}),
    "llava": ("LlavaForConditionalGeneration", {"text_config": {"model_type": "llama", **ONE_LAYER}}),
    "llava-headless": ("LlavaModel", {"text_config": {"model_type": "llama", **ONE_LAYER}}),
    "llava-mixtral-siglip": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "mixtral", **ONE_LAYER},
            "vision_config": {"model_type": "siglip_vision_model", **ONE_LAYER},
        },
    ),
    "llava-qwen2_moe": ("LlavaForConditionalGeneration", {"text_config": {"model_type": "qwen2_moe", **ONE_LAYER}}),
    "paligemma": ("PaliGemmaForConditionalGeneration", {"text_config": {"model_type": "gemma", **ONE_LAYER}}),
    "gemma3": ("Gemma3ForConditionalGeneration", TEXT),
    "mllama": (
        "MllamaForConditionalGeneration",
        {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [3]}},
    ),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", TEXT),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", {"text_config": {"model_type": "qwen2", **ONE_LAYER}}),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", TEXT),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeForConditionalGeneration", TEXT),
    "mistral_large4": ("MistralLarge4ForConditionalGeneration", TEXT),
    "molmo2": ("Molmo2ForConditionalGeneration", TEXT),
    "step3p7": ("Step3p7ForConditionalGeneration", TEXT),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", TEXT),
}
GUARDS = ("vision_tower.encoder.blocks.0.norm0.weight", "vision_tower.encoder.blocks.0.mlp.fc0.weight")
Row = tuple[str, tuple[str, ...], tuple[str, ...]]


def built(name: str) -> Any:
    """The model, without weights."""
    class_name, arguments = MODELS[name]
    cls = getattr(transformers, class_name)
    with torch.device("meta"):
        return cls._from_config(cls.config_class(**arguments))


def config_of(model: Any) -> dict[str, Any]:
    """config.json as the model writes it."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return config | {"architectures": [type(model).__name__]}


def ours(conversions: Conversions) -> tuple[list[Row], list[Row]]:
    """Renames and converters, each as pattern, targets and scopes."""

    def rows(found: list[Scoped]) -> list[Row]:
        return [(rule.transform.pattern.pattern, rule.transform.targets, rule.scopes) for rule in found]

    return rows(conversions.renames), rows(conversions.converters)


def theirs(transforms: list[Any]) -> tuple[list[Row], list[Row]]:
    found: tuple[list[Row], list[Row]] = ([], [])
    for transform in transforms:
        scopes: tuple[str, ...] = ()
        if transform.scope_prefix is not None:
            inner = f"{transform.scope_prefix}." if transform.scope_prefix else ""
            scopes = (f"{transform.base_model_prefix}." * bool(transform.base_model_prefix) + inner, inner)
        row = (transform.compiled_sources.pattern, tuple(transform.target_patterns), scopes)
        found[isinstance(transform, WeightConverter)].append(row)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_config_has_the_rules_that_transformers_collects_for_its_model(name: str) -> None:
    reference()
    model = built(name)
    config = config_of(model)
    expected = theirs(get_model_conversion_mapping(model))
    assert ours(shipped().conversions(architecture_of(config), config, GUARDS)) == expected


def test_a_plain_model_has_old_spellings_only() -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    conversions = shipped().conversions(architecture_of(config), config, ())
    assert {rule.transform.key.partition("[")[0] for rule in conversions.renames} == {"legacy"}
    assert conversions.converters == []
    assert conversions.rewrite("bert.LayerNorm.gamma").name == "bert.LayerNorm.weight"


def kimi(*stored: str) -> Conversions:
    config = {"model_type": "kimi_k25", "text_config": {}, "vision_config": {}}
    return shipped().conversions(architecture_of(config), config, stored)


def test_guarded_renames_act_where_their_first_source_is_stored() -> None:
    reference()
    model = built("kimi_k25")
    block = "vision_tower.encoder.blocks.1"
    names = [f"{block}.{part}.weight" for part in ("mlp.fc0", "mlp.fc1", "norm0", "norm1", "wo")]
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = dict.fromkeys(model.state_dict())
    engine = kimi(*names)
    for name in names:
        expected, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        assert engine.rewrite(name).name == expected
        assert expected in known


def test_guarded_renames_are_idle_where_the_names_are_the_models_already() -> None:
    names = [f"model.vision_tower.layers.1.{part}.weight" for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")]
    engine = kimi(*names)
    assert [engine.rewrite(name).name for name in names] == names
    assert len(engine.renames) == len(kimi(*GUARDS).renames) - 2
    second = "vision_tower.encoder.blocks.1.norm1.weight"
    assert engine.rewrite(second).name == "model.vision_tower.layers.1.norm1.weight"


def test_an_index_is_shifted() -> None:
    (rule,) = [rule for rule in shipped().transforms("inkling2_text") if rule.offset]
    assert rule.rewrite("attn_res.attn_queries.4.weight") == ("layers.5.attention_input.query.weight", 0)
    others = [rule for rule in shipped().transforms("inkling2_text") if "mlp_queries" in rule.sources[0]]
    assert [rule.rewrite("attn_res.mlp_queries.4") for rule in others] == [("layers.4.mlp_input.query", 0)]


def test_names_that_are_the_models_already_are_left_alone() -> None:
    config = {"model_type": "laguna", "architectures": ["LagunaForCausalLM"]}
    conversions = shipped().conversions(architecture_of(config), config, ())
    own = "model.layers.3.mlp.shared_experts.up_proj.weight"
    assert conversions.rewrite(own).name == own
    assert conversions.rewrite(own).rules == ()
    assert conversions.rewrite("model.layers.3.mlp.shared_expert.up_proj.weight").name == own
    assert "model.layers.#.mlp.shared_experts.up_proj.weight" in conversions.fixed


def test_a_rule_holds_under_its_path_only_with_and_without_the_base_prefix() -> None:
    rule = Scoped(Transform("k[0]", re.compile("(?P<g0>^a)"), ("^a",), ("b",)), ("model.tower.", "tower."))
    assert rule.rewrite("model.tower.a.weight") == ("model.tower.b.weight", 0)
    assert rule.rewrite("tower.a.weight") == ("tower.b.weight", 0)
    assert rule.rewrite("model.a.weight") is None
    assert rule.rewrite("a.weight") is None


def test_a_name_takes_every_rename_and_one_conversion() -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    conversions = shipped().conversions(architecture_of(config), config, ())
    found = conversions.rewrite("model.layers.0.block_sparse_moe.experts.11.w3.weight")
    assert (found.name, found.renamed) == (
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.11.w3.weight",
    )
    assert (found.rules, found.source) == (("mixtral[0]", "mixtral[1]"), 1)


# --- files ------------------------------------------------------------------------------------------------------------
RENAME = {"from": ["a"], "kind": "rename", "re": "(?P<g0>a)", "to": ["b"]}
TABLE = {
    "meta": {"format": 1, "transformers": "9"},
    "transforms": [RENAME],
    "rules": {"x": [0]},
    "classes": {},
    "auto": {},
}


def test_a_model_type_that_transformers_does_not_have_goes_by_the_names_in_its_config() -> None:
    table = Table(TABLE)
    for config in ({"model_type": "x"}, {"architectures": ["x"]}, {"architectures": ["y", "z"], "model_type": "x"}):
        assert table.conversions(None, config, ()).rewrite("a.weight").name == "b.weight"
    for config in (
        {"model_type": "y"},
        {"architectures": ["y", "x"]},
        {"architectures": "x"},
        {"model_type": ["x"]},
        {},
    ):
        assert table.conversions(None, config, ()).rewrite("a.weight").name == "a.weight"


def test_the_shipped_table_stands_its_own_check() -> None:
    shipped().check()


MISSING = "a section or a field is missing"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"meta": {"format": 2, "transformers": "9"}}, "its format is 2"),
        ({"rules": []}, "are objects"),
        ({"classes": 1}, "are objects"),
        ({"rules": {"x": [1]}}, MISSING),
        ({"rules": {"x": ["0"]}}, MISSING),
        ({"transforms": [{**RENAME, "re": "(?P<g0>("}]}, "unterminated subpattern"),
        ({"transforms": [{**RENAME, "re": "a"}]}, "x[0] lacks a group"),
        ({"transforms": [{**RENAME, "to": ["\\1"]}]}, "x[0] lacks a group"),
        ({"transforms": [{**RENAME, "to": []}]}, "x[0] lacks a target"),
        (
            {"transforms": [{**RENAME, "from": ["a", "c"], "re": "(?P<g0>a)|(?P<g1>c)", "kind": "group"}]},
            "lacks a target",
        ),
        ({"transforms": [{**RENAME, "ops": [["Shuffle", {}]]}]}, "unknown operator Shuffle"),
        ({"transforms": [{key: value for key, value in RENAME.items() if key != "kind"}]}, MISSING),
        ({"classes": {"X": {"subs": [["a", "B"]]}}}, "not enough values"),
        ({"classes": {"X": {"subs": [["a", "B", "b", 1]]}}}, MISSING),
    ],
)
def test_a_users_table_is_looked_at_all_over(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps({**TABLE, **change}))
    with pytest.raises(MalformedInputError) as caught:
        load_checked(path)
    assert caught.value.exit_code == 3
    assert word in str(caught.value)


def test_a_good_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rules.json"
    path.write_text(json.dumps(TABLE))
    assert list(load_checked(path).keys) == list(load(path).keys) == ["x"]
