"""The four ways in which adapter keys go wrong in the field: everything under a wrong prefix, one projection renamed,
adapter names in the keys, no prefix at all. The first two must stop the run, the last two must merge the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.refusals.making import (
    LAYERS,
    PREFIX,
    TARGETS,
    Stored,
    all_factors,
    inputs_at,
    load_all,
    make_adapter,
    make_base,
    merged,
    refused,
)


def renamed(old: str, new: str) -> dict[str, Stored]:
    return {key.replace(old, new): value for key, value in all_factors().items()}


@pytest.mark.parametrize(
    "prefix", ["base_model.model.policy.model.", "base_model.policy.model.", "actor.base_model.model.model."]
)
def test_a_whole_adapter_under_a_wrong_prefix_is_refused(tmp_path: Path, prefix: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", renamed(f"{PREFIX}model.", prefix))
    count = 2 * len(TARGETS)
    outcome = refused(
        4,
        f"{count} of {count} adapter keys match no tensor in the base",
        f"{prefix}layers.0.self_attn.q_proj.lora_A.weight\n",
        "nearest  model.layers.0.self_attn.q_proj.weight",
        "... 3 more",
        "no key matches at all: is this the base the adapter was trained on?",
        base=base,
        adapters=adapter,
    )
    assert outcome.err.count("nearest  ") >= 5


@pytest.mark.parametrize("prefix", ["base_model.model.language_model.model.", "base_model.model.model.language_model."])
def test_a_prefix_of_a_known_wrapper_is_solved_for_the_whole_adapter(tmp_path: Path, prefix: str) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy")
    wrapped = make_adapter(tmp_path / "wrapped", renamed(f"{PREFIX}model.", prefix))
    merged(base, wrapped, tmp_path / "out")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "healthy")


def test_one_projection_renamed_is_refused_and_each_of_its_keys_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", renamed("q_proj", "query_proj"))
    refused(
        4,
        f"{2 * LAYERS} of {2 * len(TARGETS)} adapter keys match no tensor in the base",
        *(
            f"{PREFIX}model.layers.{layer}.self_attn.query_proj.lora_{half}.weight"
            for layer in range(LAYERS)
            for half in "AB"
        ),
        "tried    model.layers.0.self_attn.query_proj.weight (exact)",
        "nearest  model.layers.1.self_attn.q_proj.weight",
        "`streammerge inspect ADAPTER --base BASE`",
        base=base,
        adapters=adapter,
    )


def test_one_projection_of_one_layer_renamed_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(
        tmp_path / "adapter", renamed("layers.1.self_attn.v_proj", "layers.1.self_attn.v_projection")
    )
    refused(4, f"2 of {2 * len(TARGETS)} adapter keys", "layers.1.self_attn.v_projection", base=base, adapters=adapter)


@pytest.mark.parametrize("name", ["default", "lora", "my-adapter"])
def test_keys_with_an_adapter_name_merge_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy")
    tensors = {key.removesuffix("weight") + f"{name}.weight": value for key, value in all_factors().items()}
    merged(base, make_adapter(tmp_path / "named", tensors), tmp_path / "out")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "healthy")
    assert load_all(tmp_path / "out") != load_all(base)


@pytest.mark.parametrize("prefix", ["", "base_model.model.base_model.model.", "module.base_model.model."])
def test_keys_without_the_prefix_or_with_more_of_it_merge_to_the_same_bytes(tmp_path: Path, prefix: str) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy")
    tensors = {prefix + key.removeprefix(PREFIX): value for key, value in all_factors().items()}
    merged(base, make_adapter(tmp_path / "bare", tensors), tmp_path / "out")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "healthy")
