"""Adapter keys come apart the same way whatever wrapped them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streammerge.names.grammar import SLOTS, AdapterKey, KeyKind, parse_key

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "peft_key_vectors.json").read_text())

WRAPPERS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"]
SEGMENTS = (
    ["model", "layers", "self_attn", "q_proj", "mlp", "experts", "default", "lora", "lora_A_proj", "weight", "bias"]
    + ["transformer", "h", "attn", "c_attn", "language_model", "encoder", "my-adapter", "classifier", "score"]
    + [str(number) for number in (0, 1, 7, 31, 127)]
)
PREFIXES = ["", "base_model.model.", "base_model.model.base_model.model.", "module.base_model.model."]
PREFIXES += ["pretrained_model.base_model.model.", "_orig_mod.base_model.model.", "module."]
NAMES = ["default", "my-adapter", "lora", "0", "vision", "weight", "bias", "q_proj", "model"]
PLAIN_SLOTS = ["lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "hada_w1_a", "lokr_w2", "ia3_l"]
PLAIN_SLOTS += ["vera_lambda_b", "oft_R", "boft_s", "trainable_tokens_delta", "shira_indices", "miss_block"]

paths = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=8)


@st.composite
def wrapped_paths(draw: st.DrawFn) -> tuple[str, str]:
    """A module path, and the same behind a prefix and with wrappers anywhere in it."""
    path = draw(paths)
    spread: list[str] = []
    for segment in path:
        spread += [*draw(st.lists(st.sampled_from(WRAPPERS), max_size=2)), segment]
    return ".".join(path), draw(st.sampled_from(PREFIXES)) + ".".join(spread)


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["key"] for vector in VECTORS])
def test_known_keys_give_module_slot_and_depth(vector: dict[str, Any]) -> None:
    found = parse_key(vector["key"])
    assert (found.module, found.slot, found.depth) == (vector["module"], vector["slot"], vector["depth"])
    assert found.key == vector["key"]


def test_there_are_34_vectors() -> None:
    assert len(VECTORS) == 34


@given(
    wrapped_paths(),
    st.sampled_from(PLAIN_SLOTS),
    st.integers(0, 3),
    st.sampled_from([None, *NAMES]),
    st.sampled_from(["", ".weight"]),
)
def test_module_slot_and_depth_survive_wrappers_prefixes_and_names(
    paths: tuple[str, str], slot: str, depth: int, name: str | None, end: str
) -> None:
    module, wrapped = paths
    end = end if name != "weight" and name != "bias" else ".weight"
    found = parse_key(f"{wrapped}{'.base_layer' * depth}.{slot}{'' if name is None else '.' + name}{end}")
    assert (found.module, found.slot, found.depth, found.adapter_name) == (module, slot, depth, name)
    assert found.kind is (KeyKind.TOKENS if slot == "trainable_tokens_delta" else KeyKind.FACTOR)
    assert found.inside is None


@given(wrapped_paths(), st.sampled_from(["weight", "bias", "running_mean", "in_proj_weight", "A_log"]))
def test_full_tensors_keep_their_module(paths: tuple[str, str], last: str) -> None:
    module, wrapped = paths
    for middle in ("", ".base_layer", ".modules_to_save", ".modules_to_save.default"):
        found = parse_key(f"{wrapped}{middle}.{last}")
        assert (found.module, found.slot, found.depth, found.kind) == (module, last, 0, KeyKind.REPLACEMENT)
    assert parse_key(f"{wrapped}.original_module.{last}").kind is KeyKind.BASE_COPY
    assert parse_key(f"{wrapped}.original_module.{last}").module == module


@example(key="_orig_mod")  # nothing but a wrapper
@given(
    st.text(alphabet="ab._", max_size=30) | st.lists(st.sampled_from([*SEGMENTS, *WRAPPERS, *SLOTS, ""])).map(".".join)
)
def test_any_text_parses(key: str) -> None:
    assert parse_key(key).key == key


@pytest.mark.parametrize(
    ("key", "module", "slot", "name"),
    [
        ("base_model.model.score.modules_to_save.default.weight", "score", "weight", "default"),
        ("base_model.model.score.modules_to_save.weight", "score", "weight", None),
        ("classifier.modules_to_save.my-adapter.dense.weight", "classifier.dense", "weight", "my-adapter"),
        ("base_model.model.model.norm.running_mean", "model.norm", "running_mean", None),
        ("base_model.model.lm_head.base_layer.weight", "lm_head", "weight", None),
        ("base_model.model.model.embed_tokens.token_adapter.base_layer.weight", "model.embed_tokens", "weight", None),
        ("base_model.model.lora.default.weight", "lora.default", "weight", None),
        ("base_model.model.a.lora_A_proj.weight", "a.lora_A_proj", "weight", None),
        ("a.modules_to_save.default.lora_A.weight", "a.lora_A", "weight", "default"),
        ("a.prompt_embeddings.weight", "a.prompt_embeddings", "weight", None),
        ("a.lora_A.vision.tower.blocks.weight", "a.lora_A.vision.tower.blocks", "weight", None),
    ],
)
def test_full_tensors_are_replacements(key: str, module: str, slot: str, name: str | None) -> None:
    assert parse_key(key) == AdapterKey(key, module, slot, KeyKind.REPLACEMENT, 0, name, None)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("base_model.model.score.original_module.weight", "score"),
        ("base_model.model.classifier.original_module.dense.weight", "classifier.dense"),
    ],
)
def test_copies_of_the_base_are_told_from_replacements(key: str, module: str) -> None:
    assert parse_key(key) == AdapterKey(key, module, "weight", KeyKind.BASE_COPY)


@pytest.mark.parametrize(
    ("key", "module", "slot", "method"),
    [
        ("base_model.vera_A", "", "vera_A", "vera"),
        ("base_model.vblora_vector_bank", "", "vblora_vector_bank", "vblora"),
        ("base_model.model.base_model.vera_B", "base_model", "vera_B", "vera"),
        ("base_model.frod_V.q_proj", "", "frod_V.q_proj", "frod"),
        ("prompt_embeddings", "", "prompt_embeddings", "prompt_learning"),
        ("m.q.adamss_A.3", "m.q", "adamss_A.3", "adamss"),
        ("m.q.peanut_encoders.0.weight", "m.q", "peanut_encoders.0", "peanut"),
        ("m.q.glora_A.Xd", "m.q", "glora_A.Xd", "glora"),
        ("m.q.glora_A.default.Xu", "m.q", "glora_A.Xu", "glora"),
        ("m.q.psoft_R.weight", "m.q", "psoft_R", "psoft"),
        ("m.q.psoft_R.vector_a", "m.q", "psoft_R.vector_a", "psoft"),
        ("m.norm.ln_tuning_layers.weight", "m.norm", "ln_tuning_layers", "ln_tuning"),
        ("m.norm.ln_tuning_layers.default.bias", "m.norm", "ln_tuning_layers.bias", "ln_tuning"),
        ("m.q.osf_svd_params.U_low", "m.q", "osf_svd_params.U_low", "osf"),
        ("internal_xlora_classifier.layers.0.weight", "", "internal_xlora_classifier.layers.0", "xlora"),
        ("m.q.lora_A.vision.lora_A.weight", "m.q.lora_A.vision", "lora_A", "lora"),
    ],
)
def test_slots_of_every_method_are_known(key: str, module: str, slot: str, method: str) -> None:
    found = parse_key(key)
    assert (found.module, found.slot, found.method, found.kind) == (module, slot, method, KeyKind.FACTOR)


def test_several_adapter_names_in_one_file_show() -> None:
    keys = ["m.q.lora_A.first.weight", "m.q.lora_A.second.weight", "m.q.lora_B.first.first.weight", "m.q.lora_B.weight"]
    assert [parse_key(key).adapter_name for key in keys] == ["first", "second", "first", None]
    assert parse_key("m.q.lora_B.first.bias").adapter_name == "first"
    assert parse_key("m.q.lora_B.first.bias").slot == "lora_B.bias"


@pytest.mark.parametrize(
    ("key", "module", "depth", "inside"),
    [
        ("base_model.model.enc.0.attn.base_layer.out_proj.lora_A.weight", "enc.0.attn.out_proj", 0, "enc.0.attn"),
        ("enc.attn.base_layer.out_proj.base_layer.lora_B.weight", "enc.attn.out_proj", 1, "enc.attn"),
        ("enc.attn.base_layer.lora_B.weight", "enc.attn", 1, None),
        ("enc.attn.base_layer.out_proj.bias", "enc.attn.out_proj", 0, "enc.attn"),
        ("enc.attn.base_layer.in_proj_weight", "enc.attn", 0, None),
    ],
)
def test_a_module_inside_a_wrapped_one_names_it(key: str, module: str, depth: int, inside: str | None) -> None:
    found = parse_key(key)
    assert (found.module, found.depth, found.inside) == (module, depth, inside)


def test_a_parsed_key_and_the_table_of_slots_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_key("a.lora_A.weight").slot = "lora_B"  # type: ignore[misc]
    with pytest.raises(TypeError):
        SLOTS["lora_C"] = "lora"  # type: ignore[index]


def test_every_slot_that_installed_peft_saves_is_known() -> None:
    tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
    import peft  # noqa: F401 (defines the tuner classes)

    pending, names = [tuners_utils.BaseTunerLayer], set()
    while pending:
        layer = pending.pop()
        pending += layer.__subclasses__()
        if layer.__module__.startswith("peft.tuners."):
            names |= set(getattr(layer, "adapter_layer_names", ()))
    assert {"lora_A", "hada_w1_a", "vera_lambda_b"} <= names
    assert names - {"shadow_dropout"} <= SLOTS.keys(), "shadow_dropout holds nn.Dropout, which has no tensor"
