"""Every operator does to pieces what transformers' operator of that name does to tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import core_model_loading as theirs

from streammerge.names.operators import OPERATORS, Setting, apply_operators
from tests.names.rebuilding import Array, rebuilt, stored_part

CONFIG = {"num_attention_heads": 2, "hidden_size": 8, "head_dim": 4, "num_key_value_heads": 1}
VISION = {"vision_config": {"num_attention_heads": 3}}
Shapes = Mapping[str, Sequence[tuple[int, ...]]]


def made(shapes: Shapes) -> dict[str, list[Array]]:
    """Arrays by pattern; every element of all of them is another number."""
    result: dict[str, list[Array]] = {}
    first = 0
    for pattern, own in shapes.items():
        for shape in own:
            count = math.prod(shape)
            result.setdefault(pattern, []).append(np.arange(first, first + count).reshape(shape))
            first += count
    return result


def ours(steps: Any, arrays: Mapping[str, list[Array]], targets: Sequence[str], config: Any) -> dict[str, Array]:
    stored = {f"{pattern}/{n}": array for pattern, own in arrays.items() for n, array in enumerate(own)}
    parts = {p: [stored_part(f"{p}/{n}", array) for n, array in enumerate(own)] for p, own in arrays.items()}
    found = apply_operators(parts, steps, Setting(tuple(arrays), tuple(targets), config))
    return {target: rebuilt(part.shape, part.pieces, stored) for target, part in found.items()}


def reference(operators: Sequence[Any], arrays: Mapping[str, list[Array]], targets: Sequence[str], **more: Any) -> Any:
    tensors: Any = {pattern: [torch.from_numpy(array) for array in own] for pattern, own in arrays.items()}
    for operator in operators:
        tensors = operator.convert(tensors, source_patterns=list(arrays), target_patterns=list(targets), **more)
    return {target: (found[0] if isinstance(found, list) else found).numpy() for target, found in tensors.items()}


def as_config(values: Mapping[str, Any]) -> SimpleNamespace:
    return SimpleNamespace(**{k: as_config(v) if isinstance(v, Mapping) else v for k, v in values.items()})


def same(steps: Any, shapes: Shapes, targets: Sequence[str], config: Mapping[str, Any] = CONFIG, **more: Any) -> None:
    """Our steps and those of transformers give the same arrays under the same patterns."""
    operators = [getattr(theirs, name)(**arguments) for name, arguments in steps]
    expected = reference(operators, made(shapes), targets, config=as_config(config), **more)
    found = ours(steps, made(shapes), targets, config)
    assert found.keys() == expected.keys()
    for target, array in expected.items():
        np.testing.assert_array_equal(found[target], array)


def test_there_is_a_test_for_every_operator() -> None:
    assert set(OPERATORS) == {
        "MergeModulelist", "Concatenate", "Chunk", "Split", "Transpose", "Interleave", "PermuteForRope",
        "ErnieFuseAndSplitTextVisionExperts",
    }  # fmt: skip


def test_modules_of_a_list_are_stacked() -> None:
    same([("MergeModulelist", {})], {"e.*.down": [(3, 4)] * 5}, ["down"])


def test_two_lists_are_stacked_and_joined() -> None:
    steps = [("MergeModulelist", {}), ("Concatenate", {"dim": 1})]
    same(steps, {"e.*.gate": [(3, 4)] * 3, "e.*.up": [(3, 4)] * 3}, ["gate_up"])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tensors_are_joined_along_an_axis(axis: int) -> None:
    shapes = {name: [tuple(2 + n if number == axis else 4 for number in range(3))] for n, name in enumerate("qkv")}
    same([("Concatenate", {"dim": axis})], shapes, ["qkv"])


@pytest.mark.parametrize(("total", "count"), [(12, 3), (7, 2), (10, 4), (6, 6)])
def test_a_tensor_is_cut_into_chunks_the_last_the_smallest(total: int, count: int) -> None:
    same([("Chunk", {"dim": 0})], {"qkv": [(total, 3)]}, [f"part{n}" for n in range(count)])


def test_a_tensor_is_cut_into_chunks_along_another_axis() -> None:
    same([("Chunk", {"dim": 1})], {"qkv": [(3, 6)]}, ["a", "b"])


def test_a_tensor_is_split_into_parts_of_the_sizes_of_parameters() -> None:
    sizes = {"q": 8, "k": 4, "v": 4}
    model = SimpleNamespace(get_parameter=lambda name: torch.empty(sizes[name[-1]], 3))
    expected = reference(
        [theirs.Split()], made({"att": [(16, 3)]}), ["q", "k", "v"], full_layer_name="x.q", model=model
    )
    found = ours([("Split", {"sizes": ["H*D", "KV*D", "KV*D"]})], made({"att": [(16, 3)]}), ["q", "k", "v"], CONFIG)
    assert found.keys() == expected.keys() == set("qkv")
    for name in "qkv":
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("config", [{}, {**CONFIG, "head_dim": 5}], ids=["no sizes", "sizes that do not add up"])
def test_a_split_that_does_not_fit_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        ours([("Split", {"sizes": ["H*D", "KV*D", "KV*D"]})], made({"att": [(16, 3)]}), ["q", "k", "v"], config)


@pytest.mark.parametrize(("axes", "shape"), [((0, 1), (3, 4)), ((1, 2), (2, 3, 4)), ((0, 2), (2, 3, 4))])
def test_axes_change_places(axes: tuple[int, int], shape: tuple[int, ...]) -> None:
    same([("Transpose", {"dim0": axes[0], "dim1": axes[1]})], {"x": [shape]}, ["y"])


@pytest.mark.parametrize("shape", [(2, 8, 6), (2, 6, 8)])
def test_axes_change_places_only_where_the_model_has_another_shape(shape: tuple[int, ...]) -> None:
    model = SimpleNamespace(get_parameter=lambda _: torch.empty(2, 8, 6))
    operator = theirs.Transpose(1, 2, check_dims=True)
    expected = reference([operator], made({"x": [shape]}), ["x"], model=model, full_layer_name="x")
    steps = [("Transpose", {"dim0": 1, "dim1": 2, "check_dims": True, "rows": "hid"})]
    np.testing.assert_array_equal(ours(steps, made({"x": [shape]}), ["x"], CONFIG)["x"], expected["x"])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("axis", "shape"), [(0, (8, 3)), (1, (2, 6, 3)), (2, (2, 3, 10))])
def test_lines_are_interleaved_both_ways(axis: int, shape: tuple[int, ...], inverse: bool) -> None:
    same([("Interleave", {"dim": axis, "inverse": inverse})], {"x": [shape]}, ["y"])


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(24, 3), (24,)], ids=["weight", "bias"])
@pytest.mark.parametrize("key", [None, "vision_config"])
def test_rows_are_permuted_head_by_head(shape: tuple[int, ...], key: str | None, inverse: bool) -> None:
    arguments = {"subconfig_key": key, "inverse": inverse}
    same([("PermuteForRope", arguments)], {"wq": [shape]}, ["q_proj"], {**CONFIG, **VISION})


@pytest.mark.parametrize("shape", [(36, 3), (36,)], ids=["weight", "bias"])
def test_only_named_parts_of_a_fused_projection_are_permuted(shape: tuple[int, ...]) -> None:
    permute = {"subconfig_key": "vision_config", "permute_layer_names": ["q_proj", "k_proj"]}
    steps = [("Chunk", {"dim": 0}), ("PermuteForRope", permute)]
    same(steps, {"wqkv": [shape]}, ["q_proj", "k_proj", "v_proj"], VISION)


@pytest.mark.parametrize("config", [{}, {"vision_config": {}}, {"vision_config": []}, {"num_attention_heads": "2"}])
def test_rows_are_not_permuted_by_a_guessed_number_of_heads(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="how many heads"):
        ours([("PermuteForRope", {"subconfig_key": "vision_config"})], made({"wq": [(8, 3)]}), ["q"], config)


@pytest.mark.parametrize("count", [4, 6])
def test_experts_are_for_text_then_for_images(count: int) -> None:
    step = [("ErnieFuseAndSplitTextVisionExperts", {"stack_dim": 0, "concat_dim": 1})]
    shapes = {"e.*.gate": [(3, 4)] * count, "e.*.up": [(3, 4)] * count}
    same(step, shapes, ["text.gate_up", "vision.gate_up"])
    same(step, {"e.*.down": [(4, 3)] * count}, ["text.down", "vision.down"])


def test_lists_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        ours([("MergeModulelist", {})], made({"e": [(3, 4), (4, 3)]}), ["x"], CONFIG)
    with pytest.raises(ValueError, match="different shapes"):
        ours([("Concatenate", {"dim": 0})], made({"a": [(3, 4)], "b": [(3, 5)]}), ["x"], CONFIG)


def test_an_odd_number_of_rows_is_not_interleaved() -> None:
    with pytest.raises(ValueError, match="do not fold"):
        ours([("Interleave", {"dim": 0})], made({"x": [(5, 2)]}), ["y"], CONFIG)
