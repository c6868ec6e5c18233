"""Fields of an adapter's config that stop a merge: unknown and set, not finite, of the wrong kind, or switching on what
has no merged weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.refusals.making import (
    MARKER,
    inputs_at,
    load_all,
    make_adapter,
    make_base,
    merged,
    refused,
)

SWITCHED_ON = {
    "a_field_of_the_future": (True, ("`--ignore-config-field a_field_of_the_future`", "a_field_of_the_future")),
    "alora_invocation_tokens": ([1, 2], ("aLoRA acts only after its invocation tokens",)),
    "arrow_config": ({"router_temperature": 1.0}, ("Arrow chooses among adapters for every token",)),
    "use_qalora": (True, ("QA-LoRA",)),
    "megatron_config": ({"tensor_model_parallel_size": 2}, ("Megatron",)),
    "kasa_config": ({"beta": 1}, ("KaSA",)),
    "use_bdlora": ({"nblocks": 4}, ("BD-LoRA",)),
}


@pytest.mark.parametrize("field", SWITCHED_ON)
def test_a_field_that_would_change_the_mathematics_is_refused(tmp_path: Path, field: str) -> None:
    value, words = SWITCHED_ON[field]
    base, adapter = inputs_at(tmp_path, **{field: value})
    refused(4, field, *words, base=base, adapters=adapter)


@pytest.mark.parametrize("field", SWITCHED_ON)
@pytest.mark.parametrize("neutral", [False, [], {}, "", 0])
def test_the_same_field_is_of_no_consequence_while_it_is_not_set(tmp_path: Path, field: str, neutral: object) -> None:
    if neutral == {} and field == "a_field_of_the_future":
        base, adapter = inputs_at(tmp_path, **{field: neutral})
        merged(base, adapter, tmp_path / "out")
        return
    from streammerge.methods.lora_config import KNOWN

    KNOWN.check({field: neutral}, ())
    KNOWN.check({field: None}, ())


def test_an_unknown_field_that_the_user_waves_through_is_recorded(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path, new_switch=3, newer_switch="on")
    words = ("new_switch", "newer_switch", "the adapter's config sets fields that streammerge does not know")
    refused(4, *words, base=base, adapters=adapter)
    refused(4, "newer_switch", base=base, adapters=adapter, options=("--ignore-config-field", "new_switch"))
    options = ("--ignore-config-field", "new_switch", "--ignore-config-field", "newer_switch")
    merged(base, adapter, tmp_path / "out", *options)
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    assert report["options"]["ignore_config_field"] == ["new_switch", "newer_switch"]
    merged(base, make_adapter(tmp_path / "plain"), tmp_path / "without")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "without")


NOT_FINITE = {
    "alpha NaN": ({"lora_alpha": float("nan")}, "`lora_alpha` that is not finite"),
    "alpha Infinity": ({"lora_alpha": float("inf")}, "`lora_alpha` that is not finite"),
    "alpha 1e999": ({"lora_alpha": 1e999}, "`lora_alpha` that is not finite"),
    "rank NaN": ({"r": float("nan")}, "`r` that is not finite"),
    "alpha_pattern NaN": ({"alpha_pattern": {"q_proj": float("nan")}}, "`alpha_pattern[q_proj]` that is not finite"),
    "alpha_pattern -Infinity": (
        {"alpha_pattern": {"v_proj": float("-inf")}},
        "`alpha_pattern[v_proj]` that is not finite",
    ),
    "rank_pattern Infinity": (
        {"rank_pattern": {"q_proj": float("inf")}},
        "`rank_pattern[q_proj]` that is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "words"), NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_number_that_is_not_finite_is_refused_by_its_field(
    tmp_path: Path, config: dict[str, object], words: str
) -> None:
    base, adapter = inputs_at(tmp_path, **config)
    refused(4, words, base=base, adapters=adapter)


WRONG_KIND = {
    "r is text": ({"r": "8"}, "`r` that is not a number"),
    "r is zero": ({"r": 0}, "`r` that is not a whole number of at least 1"),
    "r is a half": ({"r": 1.5}, "`r` that is not a whole number"),
    "r is true": ({"r": True}, "`r` that is not a number"),
    "alpha is a list": ({"lora_alpha": [16]}, "`lora_alpha` that is not a number"),
    "use_rslora is a number": ({"use_rslora": 2}, "`use_rslora` that is not true or false"),
    "rank_pattern is a list": ({"rank_pattern": ["q_proj"]}, "`rank_pattern` that is not an object"),
    "a pattern that does not compile": ({"alpha_pattern": {"q_proj(": 8}}, "that is not a pattern"),
    "bias of another kind": ({"bias": "some"}, "`bias` that is not none, all or lora_only"),
    "modules_to_save holds numbers": ({"modules_to_save": [1]}, "`modules_to_save` that is not a list of names"),
    "layer ranges that run backwards": ({"layer_replication": [[2, 1]]}, "not a list of [first, last) ranges"),
    "no token row": ({"trainable_token_indices": [-1]}, "`trainable_token_indices` that is not a list of rows"),
    "one token twice": ({"trainable_token_indices": [3, 3]}, "not a list of different rows"),
}


@pytest.mark.parametrize(("config", "words"), WRONG_KIND.values(), ids=WRONG_KIND)
def test_a_field_of_the_wrong_kind_is_refused(tmp_path: Path, config: dict[str, object], words: str) -> None:
    base, adapter = inputs_at(tmp_path, **config)
    refused(4, words, base=base, adapters=adapter)


CONVERT = "`path_initial_model_for_weight_conversion`"
INITS = {
    "pissa_niter_4": ("its randomised decomposition of the base cannot be repeated", CONVERT),
    "pissa_niter_16": ("its randomised decomposition", CONVERT),
    "loftq": ("the base was replaced by a quantized one", CONVERT),
    "corda": ("the base was changed with covariances", CONVERT),
    "lora_ga": ("the base was changed with gradients", CONVERT),
    "an_init_of_the_future": ("an initialisation that streammerge does not know",),
}


@pytest.mark.parametrize("init", INITS)
def test_an_initialisation_that_changed_the_base_beyond_repair_is_refused(tmp_path: Path, init: str) -> None:
    base, adapter = inputs_at(tmp_path, init_lora_weights=init)
    refused(4, init, *INITS[init], base=base, adapters=adapter)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_only_chose_the_factors_merges_alike(tmp_path: Path, init: object) -> None:
    base, adapter = inputs_at(tmp_path, init_lora_weights=init)
    merged(base, adapter, tmp_path / "out")
    merged(base, make_adapter(tmp_path / "plain"), tmp_path / "plain-out")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "plain-out")


NO_MERGED_WEIGHT = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "XLORA", "POLY", "LILY", "SHADOW", "ADAMSS",
)  # fmt: skip


@pytest.mark.parametrize("kind", NO_MERGED_WEIGHT)
def test_a_method_without_a_merged_weight_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    base, adapter = inputs_at(tmp_path, peft_type=kind)
    refused(4, f"{kind} cannot be merged: ", f"peft_type = {kind}", base=base, adapters=adapter)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "VERA"])
def test_the_config_of_one_type_under_the_name_of_another_is_refused_by_field(tmp_path: Path, kind: str) -> None:
    base, adapter = inputs_at(tmp_path, peft_type=kind)
    refused(4, "sets fields that streammerge does not know", "lora_alpha", base=base, adapters=adapter)


def test_a_type_that_nobody_knows_is_refused_and_escaped(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path, peft_type="NEW\x1b[31m\u202eROL")
    outcome = refused(4, "NEW\\x1b[31M\\u202eROL is not supported yet", base=base, adapters=adapter)
    assert "\x1b" not in outcome.err


@pytest.mark.parametrize("kind", [None, 7, ["LORA"]])
def test_a_config_without_a_type_is_refused(tmp_path: Path, kind: object) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", peft_type=kind)
    refused(4, "does not say its `peft_type`", base=base, adapters=adapter)
