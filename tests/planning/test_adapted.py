"""A plan seen from the adapter: rules are counted by family, and what the table contributed is named."""

from __future__ import annotations

import pytest

from streammerge.planning.adapted import rule_family, rules_summary, table_rows, unknown_base

RULES = {
    "exact": ("exact", ()),
    "exact, mixtral[0] mixtral[1]": ("exact", ("mixtral[0]", "mixtral[1]")),
    "converted, LlavaModel[0]": ("converted", ("LlavaModel[0]",)),
    "fused: part 1 of 3 of `self_attn.qkv_proj`": ("fused", ()),
    "prefix-solver: `model` -> `a[1].b`": ("prefix-solver", ()),
    "prefix-solver: `model` -> ``, llava[2]": ("prefix-solver", ("llava[2]",)),
}


@pytest.mark.parametrize(("rule", "told"), RULES.items(), ids=RULES)
def test_a_rule_has_a_family_and_the_rows_that_took_part(rule: str, told: tuple[str, tuple[str, ...]]) -> None:
    assert (rule_family(rule), table_rows(rule)) == told


def test_modules_are_counted_by_the_rule_that_found_them() -> None:
    modules = [("exact",)] * 480 + [("converted, mixtral[0] mixtral[1]", "exact, other[3]")] * 80
    assert rules_summary(modules) == "480 exact, 80 converted (mixtral[0], mixtral[1], other[3])"
    assert rules_summary([]) == ""


def test_the_note_on_an_unknown_base_says_what_of_the_table_was_used() -> None:
    named = {"architectures": ["NewForCausalLM"], "model_type": "new"}
    assert unknown_base(named, ["exact", "prefix-solver: `a` -> `b`"]) == (
        "`NewForCausalLM` is not in the table of architectures: names were joined as they are and by prefixes, "
        "without knowledge of ties; no row of the table was used"
    )
    assert unknown_base({"model_type": "new"}, ()).startswith("`new` is not in the table")
    assert unknown_base({}, ["exact"]).startswith("there is no config.json: names were joined")
    used = unknown_base(named, ["exact, legacy[0]", "fused: part 1 of 2 of `x`", "converted, legacy[0]"])
    assert used.endswith("; of the table only fused, legacy[0] was used")
