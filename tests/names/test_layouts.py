"""Every row of layouts.json cuts a fused module where the model's own code does, and paths of parts find their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from streammerge.core.lines import Lines, all_lines
from streammerge.names.layouts import Layout, layouts_for
from tests.names import model_splits as own
from tests.names.layout_cases import GROUPED, HEADS, RENAMED, ROWS, splits

KINDS = {"w1": "gate", "w3": "up", "gate_proj": "gate", "up_proj": "up"} | {
    f"{before}{letter}{after}": letter for letter in "qkvzba" for before, after in (("", "_proj"), ("in_proj_", ""))
}
"""What a part's last segment says it is."""


def cut(row: dict[str, Any]) -> bool:
    """Whether a row says where a module is cut."""
    return "sizes" in row


def pairs(wanted: Callable[[dict[str, Any]], bool]) -> list[Any]:
    """(row, model type) of the rows that are wanted."""
    return [
        pytest.param(row, name, id=f"{name}-{row['fused']}-{number}")
        for number, row in enumerate(ROWS)
        if wanted(row)
        for name in row["types"]
    ]


def layout_of(row: dict[str, Any], model_type: str, config: dict[str, Any]) -> Layout | None:
    """The layout that a row gives for a config, None if the config excludes it."""
    wanted = (row["fused"], tuple(map(tuple, row["parts"])), row.get("groups", "1"), tuple(row.get("sizes", ())))
    found = [x for x in layouts_for(model_type, config) if (x.fused, x.spellings, x.groups, x.sizes) == wanted]
    assert len(found) < 2
    return found[0] if found else None


def check(layout: Layout, total: int, parts: dict[str, list[int]]) -> None:
    """Every part has exactly the rows, in the order, that the model's code gives it."""
    kinds = [KINDS[name.rpartition(".")[2]] for name in layout.parts]
    assert {kind: layout.lines(j, total).array().tolist() for j, kind in enumerate(kinds)} == parts
    for longer in (total + 1, 2 * total):
        if not {"T/2", "T/3"} & {layout.groups, *layout.sizes} or longer % len(kinds):
            with pytest.raises(ValueError, match=r"rows"):
                layout.lines(0, longer)


# --- the rows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("row", "model_type"), pairs(lambda row: cut(row) and "experts" not in row))
def test_a_row_cuts_where_the_models_code_does(row, model_type):
    cases = [case() for key, case in splits() if key == (model_type, row["fused"])]
    chosen = [(layout_of(row, model_type, config), total, parts) for config, total, parts in cases]
    chosen = [case for case in chosen if case[0] is not None]
    assert chosen, "no case for this row"
    for layout, total, parts in chosen:
        check(layout, total, parts)


@pytest.mark.parametrize(("row", "model_type"), pairs(lambda row: cut(row) and row.get("experts") == "stacked"))
def test_stacked_experts_are_cut_where_the_models_code_does(row, model_type):
    layout = layout_of(row, model_type, {})
    classes = own.expert_classes(model_type)
    assert classes
    for kind in classes:
        total, parts, transposed = own.experts(kind)
        check(layout, total, parts)
        assert layout.transposed is transposed


@pytest.mark.parametrize(("row", "model_type"), pairs(lambda row: not cut(row) and row.get("experts") == "stacked"))
def test_a_stack_of_whole_experts_lies_as_the_first_stack_of_its_module_does(row, model_type):
    layout = layout_of(row, model_type, {})
    (transposed,) = {own.experts(kind)[2] for kind in own.expert_classes(model_type)}
    assert layout.transposed is transposed
    assert (len(layout.parts), layout.lines(0, 7)) == (1, all_lines(7))


@pytest.mark.parametrize(("row", "model_type"), pairs(lambda row: not cut(row) and "experts" not in row))
def test_a_rename_is_one_that_a_published_converter_makes(row, model_type):
    assert row["parts"] == [[RENAMED[row["fused"]]]]
    assert layout_of(row, model_type, {}).lines(0, 5) == all_lines(5)


@pytest.mark.parametrize(("row", "model_type"), pairs(lambda row: row.get("experts") == "rows"))
def test_flat_experts_are_blocks_of_rows(row, model_type):
    """DBRX: each block of w1 and v1 is (intermediate, hidden), of w2 the transpose of (hidden, intermediate)."""
    config = own.config_of(model_type, d_model=4, n_heads=1, ffn_config={"moe_num_experts": 3, "ffn_hidden_size": 5})
    experts = own.modeling("dbrx").DbrxExperts(config.ffn_config)
    name = row["fused"].rpartition(".")[2]
    stored = getattr(experts.mlp, name)
    layout = layout_of(row, model_type, config.to_dict())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        token, routed = torch.ones(1, 1, 4), (torch.tensor([[1]]), torch.ones(1, 1))
        before = experts(token, *routed)
        block = layout.block(1, stored.shape[0]).array()
        assert block.tolist() == [5, 6, 7, 8, 9]
        others = torch.tensor([line for line in range(15) if line not in block])
        stored[others] = 0
        assert torch.equal(experts(token, *routed), before)
        # The module by itself, with the matrix as an ordinary Linear has it, must give the same.
        w1, v1, w2 = (getattr(experts.mlp, part)[block] for part in ("w1", "v1", "w2"))
        assert layout.transposed is (name == "w2")
        gated_product = silu(token[0] @ w1.T) * (token[0] @ v1.T)
        torch.testing.assert_close(nn.functional.linear(gated_product, w2.T), before[0])
    with pytest.raises(ValueError, match="3 experts"):
        layout.block(3, 15)
    with pytest.raises(ValueError, match="3 experts"):
        layout.block(0, 16)


def registered() -> list[Any]:
    """(row, model type, sources of the rule) where transformers itself merges experts."""
    rows = [row for row in ROWS if row.get("experts") == "stacked"]
    return [
        pytest.param(row, name, rule.source_patterns, id=f"{name}-{row['fused']}")
        for row in rows
        for name in row["types"]
        for rule in get_checkpoint_conversion_mapping(name) or ()
        if any(target and target.endswith(row["fused"].rpartition(".")[2]) for target in rule.target_patterns)
        and any("experts.*." in source for source in rule.source_patterns)
    ]


@pytest.mark.parametrize(("row", "model_type", "sources"), registered())
def test_experts_have_the_names_and_the_order_that_transformers_merges(row, model_type, sources):
    tails = [source.rpartition("experts.*.")[2].removesuffix(".weight") for source in sources]
    spellings = [[part.rpartition("{e}.")[2] for part in spelling] for spelling in row["parts"]]
    assert tails in spellings


def test_the_order_of_qwens_and_internlms_mlp():
    qwen = own.gate_and_up(lambda x: x[:3] * silu(x[3:]), 6)  # w1 in front of w2
    internlm = own.gate_and_up(lambda x: silu(x[:3]) * x[3:], 6)  # w1 in front of w3
    assert (qwen["gate"], qwen["up"]) == ([3, 4, 5], [0, 1, 2])
    assert (internlm["gate"], internlm["up"]) == ([0, 1, 2], [3, 4, 5])
    assert RENAMED["transformer.h.{i}.mlp.w2"].endswith("gate_proj")
    assert RENAMED["feed_forward.w1"].endswith("gate_proj")


def test_unsloths_experts_are_the_stacked_ones_turned_round():
    """unsloth-zoo's GptOssExpertsBnb4bit: one Linear (2 * intermediate, hidden) for each expert, cut like the stack."""
    found = {x.spellings[0][0]: x for x in layouts_for("gpt_oss", {})}
    assert found["experts.gate_up_projs.{e}"].part_of("model.layers.1.mlp.experts.gate_up_projs.12").expert == 12
    assert found["experts.gate_up_projs.{e}"].lines(0, 8) == all_lines(8)
    assert found["experts.{e}.gate_proj"].lines(1, 8) == Lines(1, 1, count=4, pitch=2)


# --- the engine -------------------------------------------------------------------------------------------------------
def only(model_type: str, fused: str, config: dict[str, Any]) -> Layout:
    (layout,) = [x for x in layouts_for(model_type, config) if x.fused == fused]
    return layout


def test_a_part_finds_its_fused_module_and_back():
    layout = only("phi3", "self_attn.qkv_proj", GROUPED)
    found = layout.part_of("base.model.layers.3.self_attn.v_proj")
    assert (found.fused, found.index, found.expert) == ("base.model.layers.3.self_attn.qkv_proj", 2, None)
    start = "base.model.layers.3.self_attn."
    assert layout.parts_of(found.fused) == ((f"{start}q_proj", f"{start}k_proj", f"{start}v_proj"),)
    assert layout.part_of("self_attn.q_proj").fused == "self_attn.qkv_proj"


@pytest.mark.parametrize("path", ["self_attn.q_proj2", "my_self_attn.q_proj", "q_proj", "self_attn.q_proj.x", ""])
def test_only_whole_segments_match(path):
    layout = only("phi3", "self_attn.qkv_proj", GROUPED)
    assert layout.part_of(path) is None
    assert layout.parts_of(path) == ()


def test_indices_carry_over():
    layout = only("qwen", "transformer.h.{i}.attn.c_attn", {**HEADS, "kv_channels": 8})
    found = layout.part_of("model.layers.11.self_attn.k_proj")
    assert (found.fused, found.index) == ("transformer.h.11.attn.c_attn", 1)
    assert layout.part_of("transformer.h.11.attn.k_proj") == found
    assert layout.parts_of("transformer.h.7.attn.c_attn")[0][2] == "model.layers.7.self_attn.v_proj"
    assert layout.part_of("model.layers.x.self_attn.k_proj") is None


def test_experts_are_told_apart():
    layout = only("mixtral", "mlp.experts.gate_up_proj", {})
    found = layout.part_of("model.layers.0.block_sparse_moe.experts.5.w3")
    assert (found.fused, found.index, found.expert) == ("model.layers.0.mlp.experts.gate_up_proj", 1, 5)
    assert layout.parts_of(found.fused, 5)[0][1] == "model.layers.0.block_sparse_moe.experts.5.w3"
    assert layout.parts_of(found.fused)[1][0] == "model.layers.0.mlp.experts.{e}.w1"


def test_a_config_without_a_size_gives_no_lines():
    layout = only("phi3", "self_attn.qkv_proj", {"hidden_size": 32})
    with pytest.raises(ValueError, match="does not say"):
        layout.lines(0, 64)


def test_the_parts_of_a_composite_config_are_looked_up_by_their_own_sizes():
    config = {
        "model_type": "llava",
        "hidden_size": 7,
        "text_config": {"model_type": "phi3", **GROUPED},
        "vision_config": {"model_type": "gpt2", "n_embd": 8, "n_head": 2},
    }
    found = {x.fused: x for x in layouts_for("llava", config)}
    assert found["self_attn.qkv_proj"].lines(1, 64) == Lines(32, 16)
    assert found["attn.c_attn"].lines(1, 24) == Lines(8, 8)


def test_the_same_layout_is_handed_out_once():
    config = {"model_type": "phi3", **GROUPED}
    found = layouts_for("phi3", config)
    assert len(set(found)) == len(found)
    assert [x.fused for x in found].count("self_attn.qkv_proj") == 1


def test_unknown_models_get_only_what_goes_by_unambiguous_names():
    assert {x.fused.partition(".")[0] for x in layouts_for("no_such_model", {})} == {"decoder"}
    assert layouts_for(None, {}) == layouts_for("no_such_model", {})


def test_every_row_is_well_formed():
    for row in ROWS:
        assert set(row) <= {"types", "when", "fused", "parts", "groups", "sizes", "experts", "transposed"}
        assert row["types"]
        assert row.get("experts") in (None, "stacked", "rows")
        for spelling in row["parts"]:
            assert len(spelling) == len(row.get("sizes", ["whole"]))
            assert ("{e}" in "".join(spelling)) is ("experts" in row)
