"""What is refused of OFT, BOFT, RoAd, MiSS, norms, biases, token rows, SHiRA, Super-tuning, C3A and GraLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.core.errors import (
    AdapterError,
    BaseMismatchError,
    ConfigContradictionError,
    IncompleteFactorsError,
    NotMergeableError,
    ShapeMismatchError,
    UnknownFieldError,
    UnmatchedKeysError,
)
from tests.factories import build, make_adapter, write_base
from tests.oracle.editing import PREFIX, WEIGHTS, Edit, set_config

WIDE = {"target_modules": ["wide"]}
ADAPTERS: Mapping[str, tuple[str, dict[str, object]]] = {
    "oft": ("OFTConfig", {"oft_block_size": 8, **WIDE}),
    "boft": ("BOFTConfig", {"boft_block_size": 8, **WIDE}),
    "boft-kernel": ("BOFTConfig", {"boft_block_size": 8, "target_modules": ["kernel"]}),
    "road": ("RoadConfig", {"group_size": 8, **WIDE}),
    "miss": ("MissConfig", {"r": 4, **WIDE}),
    "bat": ("MissConfig", {"r": 8, "init_weights": "bat", **WIDE}),
    "mini": ("MissConfig", {"r": 4, "mini_r": 4, "init_weights": "mini", **WIDE}),
    "norms": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "beft": ("BeftConfig", WIDE),
    "tokens": ("TrainableTokensConfig", {"token_indices": [1, 4], "target_modules": ["table"]}),
    "shira": ("ShiraConfig", {"r": 2, "random_seed": 0, **WIDE}),
    "super": ("SupertuningConfig", {"sparsity": 0.9, **WIDE}),
    "supra": ("SupertuningConfig", {"sparsity": 0.9, "r": 2, **WIDE}),
    "c3a": ("C3AConfig", {"block_size": 8, **WIDE}),
    "gralora": ("GraloraConfig", {"r": 4, "hybrid_r": 2, **WIDE}),
}


def adapter(name: str, root: Path) -> Path:
    """An adapter of one of the types, and beside it its base `layers`."""
    model = build("layers")
    write_base(model, root / "base", "sharded")
    peft, arguments = ADAPTERS[name]
    make_adapter(model, peft, **arguments).save_pretrained(root / "adapter")
    return root / "adapter"


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    """The adapter's tensors, changed in place."""

    def edit(given: Path) -> None:
        found = load_file(given / WEIGHTS)
        change(found)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, given / WEIGHTS, {"format": "pt"})

    return edit


def slot(name: str, change: Callable[[torch.Tensor], torch.Tensor], module: str = "wide") -> Edit:
    """One tensor made another."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        found[f"{PREFIX}{module}.{name}"] = change(found[f"{PREFIX}{module}.{name}"])

    return tensors(edit)


def without(name: str) -> Edit:
    """One tensor taken out."""
    return tensors(lambda found: found.pop(f"{PREFIX}wide.{name}"))


def renamed(old: str, new: str) -> Edit:
    """One tensor under another name."""
    return tensors(lambda found: found.update({f"{PREFIX}{new}": found.pop(f"{PREFIX}{old}")}))


def both(*edits: Edit) -> Edit:
    """One after the other."""

    def edit(given: Path) -> None:
        for each in edits:
            each(given)

    return edit


def old(*shape: int) -> Edit:
    """OFT's blocks as before 0.16."""
    return tensors(lambda found: found.update({f"{PREFIX}wide.oft_r": torch.ones(shape)}) or found.pop(TRIANGLES))


KINDS = ("weight", "bias")
TRIANGLES = f"{PREFIX}wide.oft_R.weight"
SERIES_0_17 = "PEFT 0.17.2.dev0@abc may have written it before or after the last term of OFT's series was halved"
REFUSED: Mapping[str, tuple[str, Edit, type[AdapterError], str]] = {
    "oft, an unknown field": ("oft", set_config(turn_twice=True), UnknownFieldError, "turn_twice"),
    "oft, no triangle": ("oft", slot("oft_R.weight", lambda t: t[:, :5]), ShapeMismatchError, "are no triangles"),
    "oft, too few blocks": (
        "oft",
        both(slot("oft_R.weight", lambda t: t[:1]), set_config(oft_block_size=8)),
        ShapeMismatchError,
        "its 1 blocks are of 8 inputs",
    ),
    "oft, other inputs": (
        "oft", slot("oft_R.weight", lambda t: torch.cat([t, t])), ShapeMismatchError, "for 32 inputs"
    ),
    "oft, between two eras": (
        "oft", set_config(peft_version="0.17.2.dev0@abc"), NotMergeableError, SERIES_0_17
    ),
    "oft, terms": ("oft", set_config(num_cayley_neumann_terms=0), ConfigContradictionError, "num_cayley_neumann_terms"),
    "oft, blocks that are not square": ("oft", old(2, 8, 7), ShapeMismatchError, "are no square blocks"),
    "oft, blocks of other outputs": ("oft", old(2, 8, 8), ShapeMismatchError, "of 8 outputs do not cover them"),
    "oft, two eras at once": (
        "oft",
        tensors(lambda found: found.update({f"{PREFIX}wide.oft_r": torch.ones(3, 8, 8)})),
        IncompleteFactorsError,
        "has oft_R and oft_r",
    ),
    "boft, no scale": ("boft", without("boft_s"), IncompleteFactorsError, "needs boft_R and boft_s"),
    "boft, butterflies": (
        "boft", slot("boft_R", lambda t: torch.cat([t, t])), NotMergeableError, "it has 2 butterfly factors"
    ),
    "boft, a kernel of no version": (
        "boft-kernel",
        set_config(peft_version=None),
        NotMergeableError,
        "another order since 0.14, and the config does not say which version wrote it",
    ),
    "boft, an old kernel": (
        "boft-kernel", set_config(peft_version="0.13.2"), NotMergeableError, "PEFT before 0.14 takes the values"
    ),
    "boft, no blocks": ("boft", slot("boft_R", lambda t: t[0]), ShapeMismatchError, "are no square blocks"),
    "boft, other inputs": ("boft", slot("boft_R", lambda t: t[:, :1]), ShapeMismatchError, "24 outputs and 8 inputs"),
    "road, a variant": ("road", set_config(variant="road_3"), ConfigContradictionError, "variant"),
    "road, another variant": ("road", set_config(variant="road_2"), ShapeMismatchError, "its 12 outputs are no groups"),
    "road, an odd group": ("road", set_config(group_size=3), ShapeMismatchError, "no groups of 3"),
    "road, one vector": ("road", without("road_alpha"), IncompleteFactorsError, "needs road_alpha and road_theta"),
    "road, two sizes": ("road", slot("road_alpha", lambda t: t[:4]), ShapeMismatchError, "12 thetas and 4 alphas"),
    "miss, the wrong variant": ("miss", set_config(init_weights="bat"), ShapeMismatchError, "`init_weights` is 'bat'"),
    "miss, other outputs": ("miss", slot("miss_block", lambda t: t[:, :20]), ShapeMismatchError, "for 20 outputs"),
    "miss, more than the inputs": (
        "miss", slot("miss_block", lambda t: t.repeat(5, 1)), ShapeMismatchError, "more than the inputs"
    ),
    "bat, as it is not": ("bat", set_config(init_weights=True), ShapeMismatchError, "its `init_weights` is True"),
    "bat, other outputs": ("bat", slot("miss_block", lambda t: t[:1]), ShapeMismatchError, "for 8 outputs"),
    "mini, another size": ("mini", set_config(mini_r=3), ShapeMismatchError, "its `mini_r` is 3"),
    "norms, another size": (
        "norms", slot("ln_tuning_layers.weight", lambda t: t[:8], "norm"), ShapeMismatchError, "`ln_tuning_layers`"
    ),
    "norms, no such module": (
        "norms",
        both(*(renamed(f"norm.ln_tuning_layers.{kind}", f"normal.ln_tuning_layers.{kind}") for kind in KINDS)),
        UnmatchedKeysError,
        "normal",
    ),
    "norms, a bias alone": (
        "norms",
        tensors(lambda found: found.pop(f"{PREFIX}norm.ln_tuning_layers.weight")),
        IncompleteFactorsError,
        "ln_tuning_layers.bias",
    ),
    "norms, a bias the base lacks": (
        "norms",
        tensors(
            lambda found: found.update(
                {
                    f"{PREFIX}square.ln_tuning_layers.weight": torch.ones(16, 16),
                    f"{PREFIX}square.ln_tuning_layers.bias": torch.ones(16),
                }
            )
        ),
        NotMergeableError,
        "the adapter has a bias for it, the base has none",
    ),
    "beft, no bias": (
        "beft",
        renamed("wide.beft_bias", "square.beft_bias"),
        NotMergeableError,
        "`square`: the adapter shifts its bias, and the base has none",
    ),
    "beft, another size": ("beft", slot("beft_bias", lambda t: t[:, :9]), ShapeMismatchError, "`beft_bias` has 9"),
    "tokens, none": ("tokens", set_config(token_indices=[]), ConfigContradictionError, "lists no token indices"),
    "tokens, a row too many": (
        "tokens", set_config(token_indices=[1, 4, 5]), ConfigContradictionError, "lists 3 token indices"
    ),
    "tokens, beyond the table": ("tokens", set_config(token_indices=[1, 30]), BaseMismatchError, "trains token 30"),
    "tokens, one row twice": ("tokens", set_config(token_indices=[1, 1]), ConfigContradictionError, "token_indices"),
    "shira, no indices": ("shira", without("shira_indices"), IncompleteFactorsError, "shira_indices"),
    "shira, other indices": (
        "shira", slot("shira_indices", lambda t: t[:, :5]), ShapeMismatchError, "80 values, and indices of shape [2, 5]"
    ),
    "shira, another rank": ("shira", set_config(r=3), ShapeMismatchError, "80 values, its `r` is 3"),
    "super, another sparsity": ("super", set_config(sparsity=0.8), ShapeMismatchError, "38 values, its `sparsity`"),
    "super, other indices": (
        "super", slot("supertuning_indices", lambda t: t[:5]), ShapeMismatchError, "38 values, and 5 indices"
    ),
    "supra, half a product": ("supra", without("supertuning_lora_A.weight"), IncompleteFactorsError, "lora_B"),
    "supra, two ranks": (
        "supra", slot("supertuning_lora_A.weight", lambda t: t[:1]), ShapeMismatchError, "ranks of its factors differ"
    ),
    "c3a, no kernels": ("c3a", slot("c3a_kernel", lambda t: t[0]), ShapeMismatchError, "no blocks of kernels"),
    "c3a, other inputs": ("c3a", slot("c3a_kernel", lambda t: t[:, :1]), ShapeMismatchError, "24 outputs and 8 inputs"),
    "gralora, two numbers of blocks": (
        "gralora", slot("gralora_A", lambda t: t[:1]), ShapeMismatchError, "`gralora_A` has shape [1, 8, 4]"
    ),
    "gralora, half a hybrid": ("gralora", without("gralora_A_general.weight"), IncompleteFactorsError, "gralora"),
    "gralora, another hybrid": (
        "gralora", slot("gralora_A_general.weight", lambda t: t[:1]), ShapeMismatchError, "its general product"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_that_cannot_be_right_is_refused(name: str, tmp_path: Path) -> None:
    kind, edit, error, words = REFUSED[name]
    given = adapter(kind, tmp_path)
    edit(given)
    with pytest.raises(error) as caught:
        streammerge.plan(tmp_path / "base", given)
    assert words in str(caught.value)
