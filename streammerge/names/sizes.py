"""Sizes of fused layouts as expressions over config.json: `KV*D`, `H/KV*D`, `VH/KH*Dv`.

Owns the letters, the names that configs of different families have for each, and where the language model's config
lies inside a composite one. The invariant: a size is an exact integer or None; what is missing, of another type or not
divisible is never replaced by a guess.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

LANGUAGE_CONFIGS = ("text_config", "thinker_config", "language_config", "llm_config")
"""Where composite configs keep that of their language model, at any depth."""

NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "hid": ("hidden_size", "n_embd", "d_model", "dim"),
        "H": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
        "KV": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "attn_config.kv_n_heads", "num_query_groups"),
        "D": ("head_dim", "kv_channels", "attention_head_dim"),
        "I": ("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_config.ffn_hidden_size"),
        "M": ("moe_intermediate_size",),
        "E": (
            "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "ffn_config.moe_num_experts",
            "num_moe_experts",
        ),
        "KH": ("linear_num_key_heads",),
        "VH": ("linear_num_value_heads",),
        "Dk": ("linear_key_head_dim",),
        "Dv": ("linear_value_head_dim",),
    }
)  # fmt: skip
"""Letter to the fields that say it, the first that is set counts; a dot leads into a nested object."""

_TOKENS = re.compile(r"\s*(\d+|[A-Za-z]+|[-+*/()])")


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model inside a composite one, or `config` itself."""
    inner = next((config[name] for name in LANGUAGE_CONFIGS if isinstance(config.get(name), Mapping)), None)
    return config if inner is None else language_config(inner)


def letters(config: Mapping[str, Any]) -> dict[str, int]:
    """Every letter that `config` gives, the derived ones included: KV is H, D is hid/H where nothing else is said.

    A `multi_query` model has one KV head, unless it is a Falcon with the new decoder, which counts them; one with
    `multi_query_attention` has `multi_query_group_num`.
    """
    own = language_config(config)
    found = {letter: value for letter, names in NAMES.items() if (value := _first(own, names)) is not None}
    if own.get("multi_query") is True and own.get("new_decoder_architecture") is not True:
        found["KV"] = 1
    elif own.get("multi_query_attention") is True:
        groups = _first(own, ("multi_query_group_num",))
        found.pop("KV", None)
        if groups is not None:
            found["KV"] = groups
    elif "H" in found:
        found.setdefault("KV", found["H"])
    if "D" not in found and found.get("H") and "hid" in found and found["hid"] % found["H"] == 0:
        found["D"] = found["hid"] // found["H"]
    return found


def evaluate(expression: str, config: Mapping[str, Any]) -> int | None:
    """The value of an expression over `config`; see `compute`."""
    return compute(expression, letters(config))


def compute(expression: str, values: Mapping[str, int]) -> int | None:
    """The value of an expression of integers, letters, `+ - * /` and parentheses, in the order of arithmetic.

    None if a letter has no value, or a division leaves a remainder or is by zero. ValueError if it is no expression.
    """
    tokens = list(_tokens(expression))
    value = _sum(tokens, values)
    if tokens:
        raise ValueError(f"`{expression}` is no expression at `{tokens[0]}`")
    return value


@functools.cache
def _tokens(expression: str) -> tuple[str, ...]:
    found, at = [], 0
    while at < len(expression.rstrip()):
        match = _TOKENS.match(expression, at)
        if match is None:
            raise ValueError(f"`{expression}` is no expression at character {at}")
        found.append(match[1])
        at = match.end()
    return tuple(found)


def _sum(tokens: list[str], values: Mapping[str, int]) -> int | None:
    left = _product(tokens, values)
    while tokens and tokens[0] in ("+", "-"):
        sign = 1 if tokens.pop(0) == "+" else -1
        right = _product(tokens, values)
        left = None if left is None or right is None else left + sign * right
    return left


def _product(tokens: list[str], values: Mapping[str, int]) -> int | None:
    left = _operand(tokens, values)
    while tokens and tokens[0] in ("*", "/"):
        times = tokens.pop(0) == "*"
        right = _operand(tokens, values)
        if left is None or right is None or (not times and (right == 0 or left % right)):
            left = None
        else:
            left = left * right if times else left // right
    return left


def _operand(tokens: list[str], values: Mapping[str, int]) -> int | None:
    token = tokens.pop(0) if tokens else ""
    if token == "(":
        value = _sum(tokens, values)
        if not tokens or tokens.pop(0) != ")":
            raise ValueError("a parenthesis is not closed")
        return value
    if token.isdigit():
        return int(token)
    if not token.isalpha():
        raise ValueError(f"`{token}` where a number or a letter belongs")
    return values.get(token)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first field that is set. None if it is no positive integer: another field must not stand in for it."""
    for name in names:
        value: Any = config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            return value if type(value) is int and value > 0 else None
    return None
