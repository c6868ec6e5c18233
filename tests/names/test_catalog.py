"""What is stored is found under the model's name, under its own, and under names of other eras."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from streammerge.core.lines import Lines, all_lines
from streammerge.core.tensors import TensorInfo
from streammerge.names.architectures import architecture_of
from streammerge.names.catalog import Catalog
from streammerge.names.pieces import Axis, Parameter, Piece
from tests.names.rebuilding import Array, rebuilt

MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 4}
LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model"},
}
EXPERTS = "model.layers.0.block_sparse_moe.experts"
STACK = "model.layers.0.mlp.experts"


def catalog_of(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Catalog:
    infos = {name: TensorInfo(name, "BF16", shape, "model.safetensors", 0, 0) for name, shape in shapes.items()}
    return Catalog(infos, architecture_of(config), config)


def arrays(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    return {n: np.arange(np.prod(s)).reshape(s) + 1000 * k for k, (n, s) in enumerate(shapes.items())}


def one_by_one(count: int = 3) -> dict[str, tuple[int, ...]]:
    """Experts as published, in an order that is not that of their numbers."""
    numbers = sorted(range(count), reverse=True)
    return {f"{EXPERTS}.{e}.{w}.weight": (4, 3) if w == "w2" else (3, 4) for e in numbers for w in ("w3", "w2", "w1")}


def stacked(count: int = 3) -> dict[str, tuple[int, ...]]:
    return {f"{STACK}.gate_up_proj": (count, 6, 4), f"{STACK}.down_proj": (count, 4, 3)}


def values(found: Parameter | None, shapes: Mapping[str, tuple[int, ...]]) -> Array:
    assert found is not None
    return rebuilt(found.shape, found.pieces, arrays(shapes))


def test_experts_stored_one_by_one_are_a_parameter_in_the_order_of_their_numbers() -> None:
    shapes = one_by_one(12)
    stored = arrays(shapes)
    found = catalog_of(shapes, MIXTRAL).parameter(f"{STACK}.gate_up_proj")
    expected = [np.concatenate([stored[f"{EXPERTS}.{e}.{w}.weight"] for w in ("w1", "w3")]) for e in range(12)]
    np.testing.assert_array_equal(values(found, shapes), np.stack(expected))
    assert found is not None
    assert (found.dtype, found.rules, found.tensor) == ("BF16", ("mixtral[0]", "mixtral[1]"), None)


def test_a_renamed_tensor_is_a_parameter_and_keeps_its_own_name() -> None:
    catalog = catalog_of({"model.layers.0.block_sparse_moe.gate.weight": (3, 4)}, MIXTRAL)
    found = catalog.parameter("model.layers.0.mlp.gate.weight")
    assert found is not None
    assert (found.tensor, found.rules) == ("model.layers.0.block_sparse_moe.gate.weight", ("mixtral[0]",))
    assert catalog.parameter("model.layers.0.block_sparse_moe.gate.weight") is None
    as_it_is = catalog.tensor("model.layers.0.block_sparse_moe.gate.weight")
    assert as_it_is is not None
    assert (as_it_is.tensor, as_it_is.rules) == ("model.layers.0.block_sparse_moe.gate.weight", ())
    assert catalog.tensor("model.layers.0.mlp.gate.weight") is None


def test_the_base_prefix_may_be_missing_on_either_side() -> None:
    for stored in ("model.norm.weight", "norm.weight"):
        catalog = catalog_of({stored: (4,)}, MIXTRAL)
        for name in ("model.norm.weight", "norm.weight"):
            found = catalog.prefixed(name)
            assert found is not None
            assert found.tensor == stored
    both = catalog_of({"model.norm.weight": (4,), "norm.weight": (4,)}, MIXTRAL)
    assert both.prefixed("norm.weight") is None
    assert both.parameter("norm.weight") is not None


def test_two_stored_tensors_of_one_canonical_name_are_not_found_but_know_of_each_other() -> None:
    names = ["vision_tower.vision_model.x.weight", "vision_tower.x.weight"]
    catalog = catalog_of(dict.fromkeys(names, (2,)), LLAVA)
    assert catalog.parameter("model.vision_tower.x.weight") is None
    assert [catalog.tensor(name) for name in names] == [None, None]
    assert [catalog.twin(name) for name in names] == names[::-1]


def test_experts_that_are_stored_stacked_and_one_by_one_are_not_found_in_either_form() -> None:
    shapes = one_by_one() | {f"{STACK}.down_proj": (3, 4, 6)}
    catalog = catalog_of(shapes, MIXTRAL)
    assert catalog.parameter(f"{STACK}.down_proj") is None
    assert catalog.tensor(f"{STACK}.down_proj") is None
    assert catalog.tensor(f"{EXPERTS}.0.w2.weight") is None
    assert catalog.twin(f"{EXPERTS}.0.w2.weight") == f"{STACK}.down_proj"
    assert catalog.parameter(f"{STACK}.gate_up_proj") is not None


@pytest.mark.parametrize("gap", [0, 1])
def test_experts_that_are_not_numbered_from_zero_without_a_gap_are_tensors(gap: int) -> None:
    shapes = {name: shape for name, shape in one_by_one().items() if f".{gap}." not in name.removeprefix(EXPERTS)}
    catalog = catalog_of(shapes, MIXTRAL)
    assert catalog.parameter(f"{STACK}.gate_up_proj") is None
    assert all(catalog.parameter(name) for name in shapes)


def test_experts_of_different_shapes_are_tensors() -> None:
    shapes = one_by_one() | {f"{EXPERTS}.1.w1.weight": (2, 4)}
    catalog = catalog_of(shapes, MIXTRAL)
    assert catalog.parameter(f"{STACK}.gate_up_proj") is None
    assert catalog.parameter(f"{STACK}.down_proj") is not None


def test_the_name_of_one_expert_leads_to_its_part_of_a_stack() -> None:
    catalog = catalog_of(stacked(), MIXTRAL)
    found = catalog.translated(f"{EXPERTS}.2.w3.weight", (3, 4))
    expected = arrays(stacked())[f"{STACK}.gate_up_proj"][2, 3:]
    np.testing.assert_array_equal(values(found, stacked()), expected)
    assert found is not None
    assert found.rules == ("mixtral[0]", "mixtral[1]")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("3.w1", (3, 4)), ("0.w1", (4, 3)), ("0.w1", (3, 4, 1)), ("0.w2", (3, 4)), ("0.w1", None), ("x.w1", (3, 4))],
    ids=["no such expert", "another shape", "another number of axes", "shape of another", "no shape", "no number"],
)
def test_a_name_that_leads_nowhere_is_not_translated(name: str, shape: tuple[int, ...] | None) -> None:
    assert catalog_of(stacked(), MIXTRAL).translated(f"{EXPERTS}.{name}.weight", shape) is None


def test_a_name_that_no_rule_changes_is_not_translated() -> None:
    catalog = catalog_of({"model.norm.weight": (4,)}, MIXTRAL)
    assert catalog.translated("model.norm.weight", (4,)) is None


@pytest.mark.parametrize("stored", ["model.language_model.norm.weight", "language_model.norm.weight"])
def test_an_older_name_is_translated_with_the_base_prefix_missing_too(stored: str) -> None:
    found = catalog_of({stored: (4,)}, LLAVA).translated("language_model.model.norm.weight", None)
    assert found is not None
    assert found.tensor == stored


def test_an_absent_parameter_is_spelled_as_the_checkpoint_would() -> None:
    old = {"language_model.model.embed_tokens.weight": (8, 4), "language_model.model.norm.weight": (4,)}
    assert catalog_of(old, LLAVA).spelled("lm_head.weight") == "language_model.lm_head.weight"
    new = {"model.language_model.embed_tokens.weight": (8, 4)}
    assert catalog_of(new, LLAVA).spelled("lm_head.weight") == "lm_head.weight"
    plain = catalog_of({"model.embed_tokens.weight": (8, 4)}, {"model_type": "llama"})
    assert plain.spelled("lm_head.weight") == "lm_head.weight"


def test_names_are_those_that_something_is_found_under() -> None:
    shapes = one_by_one() | {"model.norm.weight": (4,)}
    catalog = catalog_of(shapes, MIXTRAL)
    expected = {*shapes, f"{STACK}.gate_up_proj", f"{STACK}.down_proj"}
    assert set(catalog.names) == expected
    assert len(catalog.names) == len(expected)
    assert all(catalog.parameter(name) or catalog.tensor(name) for name in catalog.names)


def test_a_config_that_nobody_knows_has_tensors_only() -> None:
    shapes = one_by_one()
    catalog = catalog_of(shapes, {"model_type": "inventor"})
    assert catalog.names == list(shapes)
    assert catalog.prefix == ""
    assert catalog.parameter(f"{EXPERTS}.0.w1.weight") == Parameter(
        f"{EXPERTS}.0.w1.weight", "BF16", (3, 4), (Piece.whole(f"{EXPERTS}.0.w1.weight", (3, 4)),)
    )


def test_a_stored_part_of_a_conversion_is_one_piece() -> None:
    found = catalog_of(one_by_one(2), MIXTRAL).parameter(f"{STACK}.down_proj")
    assert found is not None
    axes = tuple(Axis(number, all_lines(size), all_lines(size)) for number, size in enumerate((4, 3)))
    assert found.pieces == tuple(
        Piece(f"{EXPERTS}.{e}.w2.weight", (4, 3), (Axis(None, Lines(e, 1), Lines(0, 1)), *axes)) for e in range(2)
    )
