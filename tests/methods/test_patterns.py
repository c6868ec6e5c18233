"""Keys of `rank_pattern` and `alpha_pattern`: the first that PEFT would take, or a refusal that names the key."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from streammerge.core.errors import ConfigContradictionError, NotMergeableError
from streammerge.methods import patterns
from streammerge.methods.patterns import Patterns

MODULES = (
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.10.mlp.up_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layersx1xself_attn.v_proj",
    "a.b",
    "axb",
    "a",
    "",
)
KEYS = (
    "q_proj",
    "self_attn.q_proj",
    r"self_attn\.q_proj",
    "layers.1.self_attn.v_proj",
    "model.layers.0.self_attn.q_proj",
    r"model\.layers\.([0-9]|1[0-5])\.self_attn\..*",
    r".*\.1\d?\..*",
    "a.b",
    r"a\.b",
    "...",
    "up_proj|v_proj",
    "",
    "a)|(b",
    "(q|v)_proj",
    "[qv]_proj",
    "self_attn",
    "proj",
    ".*",
    "^q_proj",
    "q_proj$",
    r"\w+_proj",
    "model/layers",
)


def ours(values: Mapping[str, int], module: str) -> int | None:
    return Patterns("rank_pattern", values).value_for(module, None)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True), st.sampled_from(MODULES))
def test_the_key_is_the_one_that_peft_takes(keys: list[str], module: str) -> None:
    values = {key: number for number, key in enumerate(keys)}
    assert ours(values, module) == values.get(get_pattern_key(keys, module))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab.", max_size=4), min_size=1, max_size=5, unique=True), st.text("ab.", max_size=6))
def test_names_with_dots_are_the_patterns_that_they_are(keys: list[str], module: str) -> None:
    values = {key: number for number, key in enumerate(keys)}
    found = [value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module)]
    assert ours(values, module) == (found[0] if found else None)


def test_a_name_that_was_escaped_is_looked_up_as_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a name needs no automaton")

    monkeypatch.setattr(patterns, "Automaton", never)
    for module in MODULES[:6]:
        assert ours({re.escape(module): 7}, module) == 7
        assert ours({re.escape(module): 7}, f"{module}x") is None


def test_a_key_that_is_not_matched_here_is_refused_by_name() -> None:
    with pytest.raises(NotMergeableError, match="looks ahead or behind, and is not matched here") as caught:
        Patterns("alpha_pattern", {"q_proj": 1, "(?=q).*": 2})
    assert caught.value.about == ("alpha_pattern = '(?=q).*'",)
    with pytest.raises(ConfigContradictionError, match="`alpha_pattern` that is not a pattern"):
        Patterns("alpha_pattern", {"(?i)q_proj": 1})


def test_looking_up_ends_where_the_budget_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "STEPS", 10_000)
    monkeypatch.setattr(patterns, "STEPS_EACH", 10)
    with pytest.raises(NotMergeableError, match="takes too many steps to match"):
        ours({"(.?){300}x": 1}, "a" * 100)
    with pytest.raises(NotMergeableError, match="takes too many steps to match"):
        ours({"." * 6 + f"{number:03}": 1 for number in range(500)}, "a" * 9)
