"""Configs, weights and links of an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.hostile.case import Case, Place, fifo, fine, malformed, missing, unfit, unsafe
from tests.refusals.making import ADAPTER_CONFIG, HIDDEN, TARGETS, Stored, factors, normal, stored

WEIGHTS, CONFIG = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
contradiction, non_finite = unfit("ConfigContradictionError"), unfit("NonFiniteError")
unknown, not_mergeable = unfit("UnknownFieldError"), unfit("NotMergeableError")
A, B = factors(TARGETS[0])
HUGE_RANK = 20_000


def lora(**changes: Any) -> Callable[[Place], object]:
    """A config with other values; NaN and Infinity as Python writes them."""
    return lambda place: place.lora(**changes)


def raw(data: bytes | str) -> Callable[[Place], object]:
    """Another config, as bytes."""
    return lambda place: place.write(CONFIG, data)


def tensors(changes: Mapping[str, Stored]) -> Callable[[Place], object]:
    """Weights with other tensors."""
    return lambda place: place.factors(lambda found: found.update(changes))


def spoiled(key: str, value: float) -> Callable[[Place], object]:
    """One value of one factor."""
    shape = factors(TARGETS[0])[key].shape
    values = np.full(shape, 0.5, np.float32)
    values[-1, -1] = value
    return tensors({key: stored(values)})


def rank_pattern(*keys: str) -> Callable[[Place], object]:
    """Keys that say nothing wrong of the modules that they match."""
    return lora(rank_pattern=dict.fromkeys(keys, ADAPTER_CONFIG["r"]))


def alpha_pattern(*keys: str) -> Callable[[Place], object]:
    """Keys that change the scaling of the modules that they match."""
    return lora(alpha_pattern=dict.fromkeys(keys, 4))


def huge_rank(place: Place) -> None:
    """Factors of a very high rank, and a config that agrees."""
    place.lora(r=HUGE_RANK)
    pairs = [factors(module, rank=HUGE_RANK) for module in TARGETS]
    place.factors(lambda found: found.update({key: value for pair in pairs for key, value in pair.items()}))


def subfolder_link(place: Place) -> None:
    """`DIR:subfolder` where the subfolder is a link out of DIR."""
    (place.root / "many").mkdir()
    place.link("many/one", "../outside")
    place.adapter_argument = f"{place.root / 'many'}:one"


def inner_link(place: Place) -> None:
    """Weights that are a link inside the adapter."""
    (place.root / WEIGHTS).rename(place.adapter / "real.dat")
    place.link(WEIGHTS, "real.dat")


NUMBERS: dict[str, tuple[dict[str, object], str]] = {
    "alpha is true": ({"lora_alpha": True}, "`lora_alpha` that is not a number"),
    "alpha is text": ({"lora_alpha": "\x1b[2J"}, "lora_alpha = '\\x1b[2J'"),
    "alpha is a list of a million": ({"lora_alpha": [0] * 1_000_000}, "`lora_alpha` that is not a number"),
    "a rank of 10^30": ({"r": 10**30}, "the config says 1000000000000000000000000000000"),
    "a rank of zero": ({"r": 0}, "of at least 1"),
    "a negative rank": ({"r": -8}, "of at least 1"),
    "a rank of a half": ({"r": 0.5}, "of at least 1"),
    "a rank of true": ({"r": True}, "`r` that is not a number"),
    "a rank of 2^63": ({"r": 2**63}, "the config says 9223372036854775808"),
    "a rank for one module of 10^18": ({"rank_pattern": {"q_proj": 10**18}}, "the config says 1000000000000000000"),
    "a rank of a module that is text": ({"rank_pattern": {"q_proj": "8"}}, "`rank_pattern[q_proj]` that is not"),
    "bias of a kind that hides": ({"bias": "a\u202eb"}, "a\\u202eb"),
    "layers copied 10^9 times backwards": ({"layer_replication": [[10**9, 0]]}, "[first, last) ranges"),
    "token rows below zero": ({"trainable_token_indices": [-(2**63)]}, "list of rows"),
    "dora of another kind": ({"use_dora": "yes"}, "`use_dora` that is not true or false"),
}
CONFIGS = (
    *(contradiction(f"lora: {name}", lora(**values), words) for name, (values, words) in NUMBERS.items()),
    non_finite("lora: alpha NaN", lora(lora_alpha=float("nan")), "`lora_alpha` that is not finite"),
    non_finite("lora: alpha Infinity", lora(lora_alpha=float("inf")), "`lora_alpha` that is not finite"),
    non_finite("lora: alpha 1e999", raw(json.dumps(dict(ADAPTER_CONFIG)).replace("4", "1e999")), "`lora_alpha`"),
    non_finite("lora: alpha of a module NaN", lora(alpha_pattern={"q_proj": float("nan")}), "not finite"),
    non_finite("lora: rank Infinity", lora(r=float("inf")), "`r` that is not finite"),
    non_finite("lora: alpha 1e308", lora(lora_alpha=1e308), "finite"),
    unfit("NoEffectError")("lora: alpha zero", lora(lora_alpha=0), "nothing"),
    unknown("lora: a field of the future", lora(bidirectional_magic=True), "bidirectional_magic"),
    unknown("lora: a field that hides its name", lora(**{"a\u202e\x1b[2Jb": 1}), "a\\u202e\\x1b[2Jb"),
    unknown("lora: a field with a name of a megabyte", lora(**{"x" * 1_000_000: 1}), "characters)"),
    unknown("lora: 100,000 fields", lora(**{f"field{number}": 1 for number in range(100_000)}), "99,995 more"),
    unknown("lora: an initialisation that clears the screen", lora(init_lora_weights="\x1b[2J"), "\\x1b[2J"),
    not_mergeable("lora: a type that clears the screen", lora(peft_type="\x1b[2J"), "\\x1b[2J"),
    not_mergeable(
        "lora: a type that runs code", lora(peft_type="__import__('os').system('touch canary')"), "supported"
    ),
    not_mergeable("lora: experts that are chosen", lora(arrow_config={"top_k": 3}), "Arrow"),
    malformed("lora: a key twice", raw('{"peft_type":"LORA","r":2,"r":4}'), "`r` stands twice"),
    malformed("lora: deep", raw('{"rank_pattern":' * 40_000), "nested deeper"),
    malformed("lora: a list", raw("[]"), "not a JSON object"),
    malformed("lora: latin-1", raw(b'{"r":"\xe9"}'), "not UTF-8"),
    malformed("lora: a number of 5,000 digits", raw(f'{{"r":{"9" * 5000}}}'), "5000 digits"),
    malformed(
        "lora: 700,000 keys",
        raw(json.dumps({"rank_pattern": dict.fromkeys(map(str, range(2_000_000)), 2)})),
        "hold so many",
    ),
    missing(
        "lora: no config", lambda place: (place.adapter / "adapter_config.json").unlink(), "has no `adapter_config"
    ),
    unfit("BaseMismatchError")(
        "lora: layers copied that are not there", lora(layer_replication=[[0, 10**9]]), "layer_replication"
    ),
    fine("lora: it was made on another's disk", lora(base_model_name_or_path="/home/other/../../etc\u202e")),
    fine("lora: modules to save that are nowhere", lora(modules_to_save=["../../etc"] * 1000)),
    fine("lora: a version that is none", lora(peft_version="9" * 100_000)),
    fine("lora: a device to train on", lora(inference_mode="__import__('os').system('touch canary')")),
)
HANGING = {
    "a plus in a plus": "(a+)+b",
    "words in words": r"(\w+\.)+\w+(\w|\w\w)*zz",
    "everything, twenty times": ".*" * 20 + "x",
    "one of two, both the same": "(a|a)*(q|q)*x",
    "maybe, thirty times": "(.?){30}.{30}x",
    "everything in itself": "((.*)*)*x",
    "letters that overlap": r"([a-z]|[a-z_])*([a-z_.]|[a-z.0-9])*!",
    "spaces before the end": r"(\s|.)*(\S|.)*!",
}
PATTERNS = (
    *(fine(f"pattern: {name}", rank_pattern(key)) for name, key in HANGING.items()),
    *(fine(f"pattern: {name}, for alpha", alpha_pattern(key)) for name, key in HANGING.items()),
    fine("pattern: whatever adapts", lora(target_modules=r"((a+)+)+b|(.*)*x", exclude_modules="(a|a)*b")),
    fine("pattern: names that were escaped", rank_pattern(*(re.escape(name) for name in TARGETS))),
    fine("pattern: a range of layers", alpha_pattern(r"model\.layers\.([0-9]|1[0-5])\.self_attn\..*")),
    not_mergeable("pattern: a look ahead", rank_pattern(r"(?=(a+)+b).*"), "looks ahead or behind"),
    not_mergeable("pattern: a reference back", rank_pattern(r"(q)\1_proj|\1"), "refers back to a group"),
    not_mergeable("pattern: a possessive repetition", rank_pattern(r"q++_proj"), "possessive"),
    not_mergeable("pattern: counts in counts", rank_pattern("((a{1000}){1000}){1000}"), "more than 100,000 states"),
    not_mergeable("pattern: nothing, very often", rank_pattern("(((){60000}){60000}){60000}"), "100,000 states"),
    not_mergeable("pattern: 20,000 brackets", rank_pattern("(" * 20_000 + ")" * 20_000), "nested too deeply"),
    not_mergeable("pattern: a megabyte", rank_pattern("(a|b)" * 200_000), "characters of patterns"),
    fine("pattern: maybe, 3,000 times", alpha_pattern("(.?){3000}x")),
    contradiction("pattern: a bracket", rank_pattern("(a"), "that is not a pattern"),
    contradiction("pattern: a count beyond counting", rank_pattern("a{99999999999}"), "not a pattern"),
    contradiction("pattern: flags inside", rank_pattern("(?i)Q_PROJ"), "that is not a pattern"),
    contradiction("pattern: an escape sequence", rank_pattern("\x1b[2J("), "\\x1b[2J("),
    fine("pattern: 50,000 names", rank_pattern(*(f"model.layers.{number}.q_proj" for number in range(50_000)))),
    fine("pattern: 30,000 names with dots", rank_pattern(*("." * 25 + f"{number:06}" for number in range(30_000)))),
)
VALUES = (
    non_finite("weights: NaN in A", spoiled(A, float("nan")), "lora_A"),
    non_finite("weights: NaN in B", spoiled(B, float("nan")), "lora_B"),
    non_finite("weights: infinity in A", spoiled(A, float("inf")), "lora_A"),
    non_finite(
        "weights: what overflows",
        tensors({A: stored(np.full((2, HIDDEN), 3e38)), B: stored(np.full((HIDDEN, 2), 3e38))}),
        "not finite",
    ),
    unfit("NoEffectError")("weights: nothing but zeros", lambda place: place.factors(zeroed), "B"),
    unfit("ShapeMismatchError")("weights: of another width", tensors({A: normal("", 2, HIDDEN + 1)}), "q_proj"),
    unfit("IncompleteFactorsError")(
        "weights: one half", lambda place: place.factors(lambda found: found.pop(B)), "other half"
    ),
    unfit("UnmatchedKeysError")(
        "weights: 2,000 modules that are not there",
        lambda place: place.factors(
            lambda found: found.update(
                {f"a.b.{n}.c.lora_{x}.weight": normal("", 1, 1) for n in range(2_000) for x in "AB"}
            )
        ),
        "4,000 of 4,008",
    ),
    Case("weights: a rank of 20,000", huge_rank, 2, "BudgetError", ("needs 6.44 GB of working memory",)),
)
LINKS = (
    unsafe(
        "adapter link: weights outside",
        lambda place: place.link(WEIGHTS, "../outside/adapter_model.safetensors"),
        "leads out",
    ),
    unsafe(
        "adapter link: config outside", lambda place: place.link(CONFIG, "../outside/adapter_config.json"), "leads out"
    ),
    unsafe("adapter link: weights to a device", lambda place: place.link(WEIGHTS, "/dev/zero"), "leads out"),
    unsafe("adapter link: a subfolder outside", subfolder_link, "leads out"),
    unsafe("adapter pipe: weights", lambda place: place.special(WEIGHTS, fifo), "not a regular file"),
    unsafe("adapter pipe: config", lambda place: place.special(CONFIG, fifo), "not a regular file"),
    missing(
        "adapter link: weights to themselves", lambda place: place.link(WEIGHTS, "adapter_model.safetensors"), "neither"
    ),
    fine("adapter link: weights inside", inner_link),
)


def zeroed(found: dict[str, Stored]) -> None:
    """Every B of zeros."""
    for key, value in found.items():
        if ".lora_B." in key:
            found[key] = Stored(value.dtype, value.shape, bytes(len(value.data)))


CASES: tuple[Case, ...] = (*CONFIGS, *PATTERNS, *VALUES, *LINKS)
