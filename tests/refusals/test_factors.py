"""Factors that cannot be merged as they stand: halves, wrong shapes, empty tensors, values that are not finite, and
files that contradict their own config."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.refusals.making import (
    HIDDEN,
    INNER,
    PREFIX,
    RANK,
    TARGETS,
    Stored,
    all_factors,
    assert_nothing_loadable,
    base_tensors,
    call,
    factors,
    load_all,
    make_adapter,
    make_base,
    merged,
    normal,
    refused,
    stored,
    tree_digest,
    values_of,
)

Q0, V0, Q1, V1 = TARGETS
A0, B0 = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
MAGNITUDE = f"{PREFIX}{Q0}.lora_magnitude_vector"


def poisoned(tensor: Stored, value: float, position: int) -> Stored:
    values = values_of(tensor)
    values.reshape(-1)[position] = value
    return stored(values, tensor.dtype)


def with_(changes: dict[str, Stored | None]) -> dict[str, Stored]:
    """Healthy factors, some replaced and those given as None left out."""
    return {key: value for key, value in (all_factors() | changes).items() if value is not None}


FAULTY = {
    "A without B": (
        with_({B0: None}),
        {},
        (f"module `{Q0}` has lora_A but not its other half", A0),
    ),
    "B without A": (
        with_({A0: None}),
        {},
        (f"module `{Q0}` has lora_B but not its other half", B0),
    ),
    "only the A of every module": (
        {key: value for key, value in all_factors().items() if "lora_A" in key},
        {},
        ("has lora_A but not its other half",),
    ),
    "B for another number of outputs": (
        with_({B0: normal("B", HIDDEN + 2, RANK)}),
        {},
        (f"`{Q0}` has factors A [2, 16] and B [18, 2], `{Q0}.weight` in the base has shape [16, 16]", A0, B0),
    ),
    "A for another number of inputs": (
        with_({A0: normal("A", RANK, HIDDEN - 2)}),
        {},
        ("factors A [2, 14] and B [16, 2]", "in the base has shape [16, 16]", "is this the base"),
    ),
    "A and B of different ranks": (
        with_({B0: normal("B", HIDDEN, RANK + 1)}),
        {},
        ("A [2, 16]", "B [16, 3]", A0, B0),
    ),
    "A and B swapped": (
        with_({A0: normal("A", HIDDEN, RANK), B0: normal("B", RANK, HIDDEN)}),
        {},
        ("A [16, 2]", "B [2, 16]"),
    ),
    "factors that are vectors": (
        with_({A0: normal("A", HIDDEN), B0: normal("B", HIDDEN)}),
        {},
        ("A [16] and B [16]",),
    ),
    "one empty tensor, as ZeRO-3 saves it": (
        with_({B0: Stored("F32", (0,), b"")}),
        {},
        ("1 of 8 adapter tensors are empty", B0, "ZeRO-3", "save the adapter again"),
    ),
    "every tensor empty": (
        {key: Stored("F32", (0,), b"") for key in all_factors()},
        {},
        ("8 of 8 adapter tensors are empty", "... 3 more"),
    ),
    "NaN in A": (
        with_({A0: poisoned(all_factors()[A0], float("nan"), 5)}),
        {},
        (f"the adapter tensor `{A0}` is not finite at element 5", "diverged"),
    ),
    "infinity in B": (
        with_({B0: poisoned(all_factors()[B0], float("-inf"), 31)}),
        {},
        (f"the adapter tensor `{B0}` is not finite at element 31",),
    ),
    "NaN in a BF16 factor": (
        with_({A0: poisoned(normal("A", RANK, HIDDEN, dtype="BF16"), float("nan"), 0)}),
        {},
        (f"`{A0}` is not finite at element 0",),
    ),
    "NaN in a replaced tensor": (
        with_({f"{PREFIX}lm_head.weight": poisoned(normal("head", 24, HIDDEN), float("nan"), 7)}),
        {"modules_to_save": ["lm_head"]},
        ("lm_head.weight` is not finite at element 7",),
    ),
    "integers for factors": (
        with_({A0: stored(np.ones((RANK, HIDDEN)), "I8")}),
        {},
        (f"the adapter tensor `{A0}` has dtype I8",),
    ),
    "FP8 factors": (
        with_({A0: Stored("F8_E4M3", (RANK, HIDDEN), bytes(RANK * HIDDEN))}),
        {},
        (f"the adapter tensor `{A0}` has dtype F8_E4M3",),
    ),
    "a rank that is not the config's": (
        all_factors(),
        {"r": 4},
        (f"the factors of `{Q0}` have rank 2, the config says 4", "do not belong together"),
    ),
    "a rank that is not the rank pattern's": (
        all_factors(),
        {"rank_pattern": {"v_proj": 8}},
        (f"the factors of `{V0}` have rank 2, the config says 8",),
    ),
    "two adapters in one file": (
        {
            key.removesuffix("weight") + f"{name}.weight": value
            for name in ("default", "other")
            for key, value in all_factors().items()
        },
        {},
        ("the file holds 2 adapters in one: `default`, `other`", "a directory of its own"),
    ),
    "one factor twice": (
        with_({A0.replace(PREFIX, ""): normal("A", RANK, HIDDEN)}),
        {},
        ("two adapter tensors stand for the same factor", A0),
    ),
    "a file without tensors": ({}, {}, ("the adapter file holds no tensors",)),
    "DoRA without a magnitude": (
        all_factors(),
        {"use_dora": True},
        (f"the config says `use_dora`, but module `{Q0}` has no magnitude vector",),
    ),
    "DoRA without one of its magnitudes": (
        with_({f"{PREFIX}{module}.lora_magnitude_vector": normal("m", HIDDEN) for module in TARGETS[1:]}),
        {"use_dora": True},
        (f"module `{Q0}` has no magnitude vector",),
    ),
    "a magnitude without DoRA": (
        with_({MAGNITUDE: normal("m", HIDDEN)}),
        {},
        (f"module `{Q0}` has a DoRA magnitude, but the config does not say `use_dora`",),
    ),
    "a magnitude of another length": (
        factors(Q0) | {MAGNITUDE: normal("m", HIDDEN - 1)},
        {"use_dora": True},
        ("the magnitude has 15 values", f"`{Q0}.weight` has 16 output features"),
    ),
    "a bias for a layer without one": (
        with_({f"{PREFIX}{Q0}.lora_B.bias": normal("bias", HIDDEN)}),
        {"lora_bias": True},
        (f"`lora_bias` has 16 values for `{Q0}.bias`, which is not in the base",),
    ),
    "factors of another method": (
        {f"{PREFIX}{Q0}.hada_w1_a": normal("x", HIDDEN, RANK)},
        {},
        (f"the config says LORA, but module `{Q0}` has the factors hada_w1_a",),
    ),
}


@pytest.mark.parametrize(("tensors", "config", "words"), FAULTY.values(), ids=FAULTY)
def test_faulty_factors_are_refused(
    tmp_path: Path, tensors: dict[str, Stored], config: dict[str, object], words: tuple[str, ...]
) -> None:
    base = make_base(tmp_path / "base")
    refused(4, *words, base=base, adapters=make_adapter(tmp_path / "adapter", tensors, **config))


def test_a_bias_of_another_length_is_refused(tmp_path: Path) -> None:
    name = f"{Q0}.bias"
    base = make_base(tmp_path / "base", base_tensors() | {name: normal(name, HIDDEN, dtype="BF16")})
    tensors = with_({f"{PREFIX}{Q0}.lora_B.bias": normal("bias", HIDDEN - 4)})
    adapter = make_adapter(tmp_path / "adapter", tensors, lora_bias=True)
    refused(4, f"`lora_bias` has 12 values for `{name}`, which has shape [16]", base=base, adapters=adapter)


def test_a_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", {"model.conv.weight": normal("conv", 8, 2, 3, dtype="BF16")})
    pair = {
        f"{PREFIX}model.conv.lora_A.weight": normal("A", 4, 2, 3),
        f"{PREFIX}model.conv.lora_B.weight": normal("B", 8, 2, 1),
    }
    adapter = make_adapter(tmp_path / "adapter", pair, r=4)
    refused(4, "`model.conv` is a grouped convolution", base=base, adapters=adapter)


@pytest.mark.parametrize("kernel", [(2, 5), (3, 3)])
def test_a_kernel_of_another_shape_is_refused(tmp_path: Path, kernel: tuple[int, int]) -> None:
    base = make_base(tmp_path / "base", {"model.conv.weight": normal("conv", 8, 2, 3, dtype="BF16")})
    pair = {
        f"{PREFIX}model.conv.lora_A.weight": normal("A", RANK, *kernel),
        f"{PREFIX}model.conv.lora_B.weight": normal("B", 8, RANK, 1),
    }
    adapter = make_adapter(tmp_path / "adapter", pair)
    refused(4, "`model.conv.weight` in the base has shape [8, 2, 3]", base=base, adapters=adapter)


def without(half: str) -> dict[str, Stored]:
    """All factors, those of one half zero."""
    return {key: stored(values_of(value) * (half not in key)) for key, value in all_factors().items()}


WITHOUT_EFFECT = {
    "every B is zero": (without("lora_B"), {}),
    "every A is zero": (without("lora_A"), {}),
    "alpha is 0": (all_factors(), {"lora_alpha": 0}),
    "alpha_pattern is 0 everywhere": (all_factors(), {"alpha_pattern": {".*_proj": 0}}),
}


@pytest.mark.parametrize(("tensors", "config"), WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_an_adapter_without_effect_is_refused(
    tmp_path: Path, tensors: dict[str, Stored], config: dict[str, object]
) -> None:
    base = make_base(tmp_path / "base")
    words = ("the adapter changes nothing: every delta is zero", "an untrained adapter has B = 0")
    refused(4, *words, base=base, adapters=make_adapter(tmp_path / "adapter", tensors, **config))


def test_weights_of_zero_are_refused(tmp_path: Path) -> None:
    base, one, two = make_base(tmp_path / "base"), make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two")
    refused(4, "the adapter changes nothing: every weight is 0", base=base, adapters=one, options=("--weight", 0))
    options = ("--weight", 0, "--weight", "-0.0")
    refused(4, "the adapter changes nothing: every weight is 0", base=base, adapters=[one, two], options=options)


def test_one_zero_b_among_others_is_legitimate_and_reported(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", with_({B0: stored(np.zeros((HIDDEN, RANK)))}))
    planned = call("plan", base, adapter)
    assert planned.code == 0
    assert "4 tensors of 13, by 4 operations (1 of them zero: B = 0)" in planned.out
    assert "8 tensors, 4 modules, 1 without effect (B = 0)" in call("inspect", adapter).out
    merged(base, adapter, tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    assert before[f"{Q0}.weight"] == after[f"{Q0}.weight"]
    assert before[f"{V0}.weight"] != after[f"{V0}.weight"]


def test_a_result_that_overflows_its_dtype_stops_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_tensors(dtype="F16"))
    tensors = with_({A0: stored(np.full((RANK, HIDDEN), 300.0)), B0: stored(np.full((HIDDEN, RANK), 300.0))})
    adapter = make_adapter(tmp_path / "adapter", tensors)
    before = tree_digest(base)
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 4
    assert f"the result is not finite in `{Q0}.weight` at row 0, column 0" in outcome.err
    assert "out of range for F16" in outcome.err
    assert "--dtype bfloat16" in outcome.err
    assert_nothing_loadable(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert tree_digest(base) == before
    merged(base, adapter, tmp_path / "out", "--dtype", "float32")


def test_what_the_base_holds_that_is_not_finite_is_no_fault_of_the_adapter(tmp_path: Path) -> None:
    tensors = base_tensors()
    tensors[f"{Q0}.weight"] = poisoned(tensors[f"{Q0}.weight"], float("inf"), 3)
    base, adapter = make_base(tmp_path / "base", tensors), make_adapter(tmp_path / "adapter")
    merged(base, adapter, tmp_path / "out")
    assert np.isinf(values_of(load_all(tmp_path / "out")[f"{Q0}.weight"]).reshape(-1)[3])


def test_factors_of_a_wide_layer_fit_the_layer_they_name(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    wrong = {
        f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": normal("A", RANK, INNER),
        f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight": normal("B", INNER, RANK),
    }
    adapter = make_adapter(tmp_path / "adapter", wrong)
    refused(4, "A [2, 32] and B [32, 2]", "has shape [32, 16]", base=base, adapters=adapter)
