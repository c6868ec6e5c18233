"""Sizes are exact integers read from a config.json, or None."""

from __future__ import annotations

import pytest

from streammerge.names.sizes import compute, evaluate, language_config, letters

LLAMA = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7), ("a", 6), ("a*b", 24), ("a/b*b", None), ("a/3*b", 8), ("a*b/3", 8), ("a+b*2", 14), ("(a+b)*2", 20),
        ("a-b-1", 1), ("a - (b - 1)", 3), ("2*(a+b)/5", 4), ("a/0", None), ("c", None), ("a+c", None), ("a/4", None),
        ("12/a", 2), ("c*0", None), (" a ", 6),
    ],
)  # fmt: skip
def test_expressions_have_the_value_that_arithmetic_gives_them(expression, value):
    assert compute(expression, {"a": 6, "b": 4}) == value


@pytest.mark.parametrize("expression", ["", "a b", "a*", "(a", "a)", "a**2", "a.b", "__import__", "a//2", "-a", "a,b"])
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(ValueError, match=r".+"):
        compute(expression, {"a": 6, "b": 4})


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LLAMA, {"hid": 64, "H": 8, "KV": 2, "D": 8, "I": 96}),
        ({**LLAMA, "head_dim": 16}, {"hid": 64, "H": 8, "KV": 2, "D": 16, "I": 96}),
        ({"n_embd": 48, "n_head": 4, "n_inner": None}, {"hid": 48, "H": 4, "KV": 4, "D": 12}),
        ({"n_embd": 48, "n_head": 4, "multi_query": True}, {"hid": 48, "H": 4, "KV": 1, "D": 12}),
        ({"n_embd": 48, "n_head": 4, "multi_query": False}, {"hid": 48, "H": 4, "KV": 4, "D": 12}),
        (
            {"d_model": 48, "n_heads": 4, "attn_config": {"kv_n_heads": 2},
             "ffn_config": {"moe_num_experts": 16, "ffn_hidden_size": 10}},
            {"hid": 48, "H": 4, "KV": 2, "D": 12, "E": 16, "I": 10},
        ),
        (
            {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 8, "multi_query": True},
            {"hid": 64, "H": 8, "KV": 1, "D": 8},
        ),
        (
            {"hidden_size": 64, "num_attention_heads": 8, "num_kv_heads": 2, "multi_query": True,
             "new_decoder_architecture": True},
            {"hid": 64, "H": 8, "KV": 2, "D": 8},
        ),
        (
            {"hidden_size": 64, "num_attention_heads": 8, "kv_channels": 16, "multi_query_attention": True,
             "multi_query_group_num": 2, "ffn_hidden_size": 9},
            {"hid": 64, "H": 8, "KV": 2, "D": 16, "I": 9},
        ),
        (
            {"hidden_size": 64, "num_attention_heads": 8, "multi_query_attention": False, "multi_query_group_num": 2},
            {"hid": 64, "H": 8, "KV": 8, "D": 8},
        ),
        ({"hidden_size": 64, "num_attention_heads": 8, "multi_query_attention": True}, {"hid": 64, "H": 8, "D": 8}),
        ({"hidden_size": 65, "num_attention_heads": 8}, {"hid": 65, "H": 8, "KV": 8}),
        (
            {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 3,
             "linear_value_head_dim": 5},
            {"KH": 2, "VH": 6, "Dk": 3, "Dv": 5},
        ),
        ({"num_local_experts": 4}, {"E": 4}),
        ({"n_routed_experts": 5}, {"E": 5}),
        ({}, {}),
    ],
)  # fmt: skip
def test_letters_are_found_under_the_names_that_families_use(config, found):
    assert letters(config) == found


@pytest.mark.parametrize("value", ["8", 8.0, True, [8], 0, -8, {"a": 1}])
def test_what_is_no_positive_integer_is_not_replaced_by_another_field(value):
    assert "H" not in letters({"num_attention_heads": value, "n_head": 4})


@pytest.mark.parametrize(
    "outer",
    [
        {"text_config": LLAMA},
        {"llm_config": LLAMA, "hidden_size": 7},
        {"language_config": LLAMA},
        {"thinker_config": {"text_config": LLAMA, "audio_config": {"hidden_size": 5}}},
    ],
)
def test_the_language_models_config_counts_in_a_composite_one(outer):
    assert language_config(outer) == LLAMA
    assert evaluate("H*D + 2*KV*D", outer) == 64 + 2 * 16


def test_a_field_that_the_language_model_lacks_is_not_taken_from_outside():
    assert evaluate("hid", {"hidden_size": 64, "text_config": {"num_attention_heads": 8}}) is None
