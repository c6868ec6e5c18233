"""What is refused of LoHa, of the methods that share or draw projections, and of the spectral ones; and what their
formulas take for granted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft.tuners.waveft.wavelet import Wavelet
from torch import nn
from transformers.pytorch_utils import Conv1D

import streammerge
from streammerge.core.errors import (
    AdapterError,
    BudgetError,
    ConfigContradictionError,
    IncompleteFactorsError,
    NotMergeableError,
    ShapeMismatchError,
    UnknownFieldError,
    UnmatchedKeysError,
    UnusedKeysError,
)
from streammerge.methods import FORMULAS
from streammerge.methods.definition_order import ORDERS, in_order
from streammerge.methods.permutation import WHOLE_FROM, first_of
from streammerge.methods.wavelets import LOW_PASS, high_pass
from streammerge.names.architectures import architecture_of
from tests.factories import build, make_adapter, write_base
from tests.methods.test_turning import both, renamed, slot, tensors, without
from tests.oracle.editing import Edit, set_config

WIDE = {"target_modules": ["wide"]}
TWO = {"target_modules": ["wide", "square"]}
UNSAVED = {"save_projection": False}
ADAPTERS: Mapping[str, tuple[str, dict[str, object]]] = {
    "loha": ("LoHaConfig", {"r": 3, **WIDE}),
    "vera": ("VeraConfig", {"r": 4, **WIDE}),
    "vera drawn": ("VeraConfig", {"r": 4, **UNSAVED, **TWO}),
    "pvera": ("PveraConfig", {"r": 4, **WIDE}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 9, "vector_length": 8, **WIDE}),
    "vblora compact": (
        "VBLoRAConfig", {"r": 2, "num_vectors": 9, "vector_length": 8, "save_only_topk_weights": True, **WIDE}
    ),
    "randlora": ("RandLoraConfig", {"r": 4, **WIDE}),
    "randlora drawn": ("RandLoraConfig", {"r": 4, **UNSAVED, **TWO}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, **WIDE}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20, **WIDE}),
    "tinylora": ("TinyLoraConfig", {"weight_tying": 1.0, **WIDE}),
    "tinylora untied": ("TinyLoraConfig", TWO),
    "tinylora drawn": ("TinyLoraConfig", {"weight_tying": 1.0, **UNSAVED, **WIDE}),
    "unilora": ("UniLoraConfig", {"r": 2, "save_indices": True, **WIDE}),
    "unilora bare": ("UniLoraConfig", {"r": 2, **WIDE}),
    "frod": ("FrodConfig", {"progressbar": False, **WIDE}),
    "frod unsaved": ("FrodConfig", {"progressbar": False, **UNSAVED, **WIDE}),
}  # fmt: skip


def adapter(name: str, root: Path) -> Path:
    """An adapter of one of the types, and beside it its base `layers`."""
    model = build("layers")
    write_base(model, root / "base", "sharded")
    peft, arguments = ADAPTERS[name]
    make_adapter(model, peft, **arguments).save_pretrained(root / "adapter")
    return root / "adapter"


def shared(name: str, shape: tuple[int, ...]) -> Edit:
    """A tensor of all modules in another shape."""
    return tensors(lambda found: found.update({f"base_model.{name}": torch.ones(shape)}))


def without_shared(*names: str) -> Edit:
    """Tensors of all modules taken out."""
    return tensors(lambda found: [found.pop(f"base_model.{name}") for name in names])


REFUSED: Mapping[str, tuple[str, Edit, type[AdapterError], str]] = {
    "loha, an unknown field": ("loha", set_config(thrice=True), UnknownFieldError, "thrice"),
    "loha, a bad alpha": ("loha", set_config(alpha="much"), ConfigContradictionError, "`alpha` that is not a number"),
    "loha, half a product": ("loha", without("hada_w2_b"), IncompleteFactorsError, "hada_w2_a"),
    "loha, other outputs": ("loha", slot("hada_w1_a", lambda t: t[:9]), ShapeMismatchError, "do not make that"),
    "loha, two ranks": ("loha", slot("hada_w2_b", lambda t: t[:2]), ShapeMismatchError, "do not make that"),
    "loha, no such module": (
        "loha",
        tensors(lambda found: found.update({key.replace("wide", "wider"): found.pop(key) for key in list(found)})),
        UnmatchedKeysError,
        "wider",
    ),
    "vera, no projections": (
        "vera", without_shared("vera_A", "vera_B"), IncompleteFactorsError, "the adapter has no `vera_B`"
    ),
    "vera, too small ones": ("vera", shared("vera_A", (4, 15)), ShapeMismatchError, "do not reach"),
    "vera, another rank": ("vera", shared("vera_B", (24, 5)), ShapeMismatchError, "do not reach"),
    "vera, no seed": (
        "vera drawn", set_config(projection_prng_key="x"), ConfigContradictionError, "not a whole number"
    ),
    "vera, a huge seed": ("vera drawn", set_config(projection_prng_key=2**60), NotMergeableError, "is a seed beyond"),
    "vera, other outputs": (
        "vera", slot("vera_lambda_b", lambda t: t[:9]), ShapeMismatchError, "9 outputs of a linear layer"
    ),
    "pvera, no projections": ("pvera", without_shared("pvera_A"), IncompleteFactorsError, "no `pvera_A`"),
    "vblora, no bank": ("vblora", without_shared("vblora_vector_bank"), IncompleteFactorsError, "vblora_vector_bank"),
    "vblora, another bank": ("vblora", shared("vblora_vector_bank", (8, 8)), ShapeMismatchError, "the bank 8 vectors"),
    "vblora, too few of it": ("vblora", set_config(topk=10), ShapeMismatchError, "`topk` is 10"),
    "vblora, two ranks": (
        "vblora", slot("vblora_logits_A", lambda t: t[:1]), ShapeMismatchError, "the ranks of its factors, 1 and 2"
    ),
    "vblora, longer vectors": (
        "vblora", shared("vblora_vector_bank", (9, 16)), ShapeMismatchError, "48 outputs and 32 inputs"
    ),
    "vblora, too many weights": (
        "vblora compact",
        slot("vblora_logits_A_topk_weights", lambda t: torch.cat([t, t], 2)),
        ShapeMismatchError,
        "positions [2, 2, 2] and weights [2, 2, 2]",
    ),
    "randlora, no projections": (
        "randlora",
        both(without_shared("randlora_A", "randlora_B"), set_config(save_projection=True)),
        IncompleteFactorsError,
        "randlora_A",
    ),
    "randlora, too few blocks": ("randlora", shared("randlora_B", (24, 3, 4)), ShapeMismatchError, "do not reach"),
    "randlora, another gamma": (
        "randlora", slot("randlora_gamma", lambda t: t[:, :9]), ShapeMismatchError, "has shape [4, 9]"
    ),
    "randlora, no such module": (
        "randlora drawn",
        both(renamed("square.randlora_lambda", "round.randlora_lambda"),
             renamed("square.randlora_gamma", "round.randlora_gamma")),
        NotMergeableError,
        "depend on all adapted modules; 1 of 2 are not in the base",
    ),
    "fourierft, too many": (
        "fourierft", slot("fourierft_spectrum", lambda t: torch.ones(385)), ShapeMismatchError, "385 coefficients"
    ),
    "fourierft, a bad scaling": ("fourierft", set_config(scaling=[]), ConfigContradictionError, "`scaling`"),
    "waveft, too many": (
        "waveft", slot("waveft_spectrum", lambda t: torch.ones(385)), ShapeMismatchError, "385 coefficients"
    ),
    "waveft, no coiflet": ("waveft", set_config(wavelet_family="coif4"), NotMergeableError, "coif4 has no filter"),
    "waveft, no filter": ("waveft", set_config(wavelet_family="db20"), NotMergeableError, "db20 has no filter"),
    "tinylora, an unknown field": ("tinylora", set_config(other=1), UnknownFieldError, "other"),
    "tinylora, unknown order": (
        "tinylora untied", set_config(), NotMergeableError, "depends on the order in which the modules of this base"
    ),
    "tinylora, unknown seeds": (
        "tinylora drawn", set_config(), NotMergeableError, "depends on the order in which the modules of this base"
    ),
    "tinylora, another rank": (
        "tinylora", slot("tinylora_P", lambda t: t[:, :1]), ShapeMismatchError, "do not go together"
    ),
    "unilora, no indices": (
        "unilora bare", set_config(), NotMergeableError, "it does not say which modules it adapts"
    ),
    "unilora, half a scale": (
        "unilora", slot("unilora_scales_A", lambda t: t[:, :3]), ShapeMismatchError, "do not go together"
    ),
    "unilora, no numbers": ("unilora", without_shared("unilora_theta_d"), IncompleteFactorsError, "unilora_theta_d"),
    "frod, no projections": (
        "frod unsaved", set_config(), NotMergeableError, "the projections of its role `wide` were not saved"
    ),
    "frod, no V": ("frod", without_shared("frod_V.wide"), NotMergeableError, "its role `wide`"),
    "frod, another V": ("frod", shared("frod_V.wide", (9, 9)), ShapeMismatchError, "`frod_V.wide` [9, 9]"),
    "frod, one more V": ("frod", shared("frod_V.narrow", (24, 24)), UnusedKeysError, "frod_V.narrow"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_cannot_be_right_is_refused(name: str, tmp_path: Path) -> None:
    kind, edit, error, words = REFUSED[name]
    given = adapter(kind, tmp_path)
    edit(given)
    with pytest.raises(error) as caught:
        streammerge.plan(tmp_path / "base", given)
    assert words in str(caught.value)


BEYOND: Mapping[str, tuple[str, Edit]] = {
    "a vector": ("vblora compact", slot("vblora_logits_A_topk_indices", lambda t: t + 8)),
    "a number": ("unilora", slot("unilora_indices_A", lambda t: t + 256)),
    "a negative one": ("unilora", slot("unilora_indices_B", lambda t: t - 256)),
    "an element": ("frod", tensors(lambda found: found["base_model.frod_s_indices.wide"].add_(16))),
}


@pytest.mark.parametrize("name", BEYOND)
def test_an_index_beyond_what_there_is_is_refused(name: str, tmp_path: Path) -> None:
    kind, edit = BEYOND[name]
    given = adapter(kind, tmp_path)
    edit(given)
    with pytest.raises(NotMergeableError, match="`wide`: its indices are not all positions among"):
        streammerge.merge(tmp_path / "base", given, tmp_path / "out")


def test_a_group_without_its_vector_is_refused(tmp_path: Path) -> None:
    model = build("llama")
    base = write_base(model, tmp_path / "base", "single")
    arguments = {"target_modules": ["q_proj"]}
    make_adapter(model, "TinyLoraConfig", **arguments).save_pretrained(tmp_path / "adapter")
    without_shared("tinylora_v.1")(tmp_path / "adapter")
    with pytest.raises(IncompleteFactorsError, match="is of group 1, and there is no such vector"):
        streammerge.plan(base, tmp_path / "adapter")


def test_projections_of_a_base_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    given = adapter("vera drawn", tmp_path)
    model = build("layers")
    model.square.to(torch.bfloat16)
    write_base(model, tmp_path / "mixed", "sharded")
    with pytest.raises(NotMergeableError, match=re.escape("of which there are ['BF16', 'F32']")):
        streammerge.plan(tmp_path / "mixed", given)


def test_drawn_projections_are_in_the_plan_of_memory(tmp_path: Path) -> None:
    given = adapter("randlora drawn", tmp_path)
    operation = streammerge.plan(tmp_path / "base", given).tensors["wide.weight"].operations[0]
    projections = 4 * 16 + 24 * 4 * 4
    assert FORMULAS[operation.formula].state_memory(operation) >= 2 * 4 * projections
    with pytest.raises(BudgetError, match=r"`(wide|square).weight` needs all of it in memory, or what it is made from"):
        streammerge.plan(tmp_path / "base", given, memory="1MB")


@pytest.mark.parametrize("count", [1, 2, 3, 24 * 16, 1_000_003])
@pytest.mark.parametrize("seed", [0, 777, 2**32 + 5, -1])
def test_the_first_of_a_permutation_are_those_of_torch(count: int, seed: int) -> None:
    wanted = min(count, 300)
    permuted = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert list(first_of(count, seed, wanted)) == permuted[:wanted].tolist()
    assert count < WHOLE_FROM


@pytest.mark.parametrize("name", LOW_PASS)
def test_a_wavelet_is_what_defines_it(name: str) -> None:
    low, high = np.array(LOW_PASS[name]), np.array(high_pass(LOW_PASS[name]))
    taps, order = len(low), int(re.sub(r"\D", "", name))
    for shift in range(0, taps, 2):
        assert abs(low[shift:] @ low[: taps - shift] - (shift == 0)) < 1e-14
        assert abs(high[shift:] @ low[: taps - shift]) < 1e-14
    assert abs(low.sum() - np.sqrt(2)) < 1e-14
    vanishing, length = (2 * order, 6 * order) if name.startswith("coif") else (order, 2 * order)
    assert taps == length
    line = np.arange(taps) / taps
    assert all(abs(line**power @ high) < 1e-14 for power in range(vanishing))
    assert np.abs(low - Wavelet(name).rec_lo).max() < 1e-11


@pytest.mark.parametrize("name", ["coif4", "coif5"])
def test_what_peft_calls_a_larger_coiflet_is_no_wavelet(name: str) -> None:
    low = np.array(Wavelet(name).rec_lo)
    assert abs(low @ low - 1) > 1e-3 or abs(low.sum() - np.sqrt(2)) > 1e-3


@pytest.mark.parametrize("model_type", ORDERS)
def test_modules_are_defined_in_the_order_of_the_table(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    config.update({"n_layer" if model_type == "gpt2" else "num_hidden_layers": 12})
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * 12
    auto = transformers.AutoModelForMaskedLM if model_type == "bert" else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    defined = [name for name, module in model.named_modules() if isinstance(module, kinds) and "cls." not in name]
    architecture = architecture_of({"architectures": [type(model).__name__], "model_type": model_type})
    assert in_order(sorted(defined), architecture) == defined
    assert in_order([*defined, "another.module"], architecture) is None
    assert in_order(defined, None) is None
