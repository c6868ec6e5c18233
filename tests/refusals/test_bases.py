"""Bases that are visibly not the adapter's, or that nothing can be merged into: other shapes, another vocabulary,
quantized weights, and ties that cannot be undone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.refusals.making import (
    HIDDEN,
    MARKER,
    PREFIX,
    RANK,
    TARGETS,
    VOCABULARY,
    Stored,
    all_factors,
    base_tensors,
    call,
    load_all,
    make_adapter,
    make_base,
    merged,
    normal,
    refused,
    write_json,
)

Q0 = f"{TARGETS[0]}.weight"
ADVICE = "merge into the 16-bit checkpoint that it was quantized from, then quantize the result"


# --- another base -----------------------------------------------------------------------------------------------------
def test_a_base_of_another_width_is_refused(tmp_path: Path) -> None:
    tensors = base_tensors() | {Q0: normal(Q0, HIDDEN, 2 * HIDDEN, dtype="BF16")}
    base, adapter = make_base(tmp_path / "base", tensors), make_adapter(tmp_path / "adapter")
    words = (f"`{Q0}` in the base has shape [16, 32]", "is this the base the adapter was trained on?")
    refused(4, *words, base=base, adapters=adapter)


def test_a_base_with_fewer_layers_is_refused_for_the_layers_it_lacks(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in base_tensors().items() if ".layers.1." not in name}
    base, adapter = make_base(tmp_path / "base", tensors), make_adapter(tmp_path / "adapter")
    words = ("4 of 8 adapter keys match no tensor in the base", "layers.1.self_attn.q_proj.lora_A.weight")
    refused(4, *words, base=base, adapters=adapter)


def tokenizer(size: int, *, gap: int = 0) -> dict[str, object]:
    vocabulary = {f"t{number}": number for number in range(size - 1)}
    return {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": [{"id": size - 1 + gap, "content": "<x>"}]}


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    write_json(adapter / "tokenizer.json", tokenizer(VOCABULARY + 1))
    words = ("the adapter's tokenizer has 25 ids, the embedding has 24 rows", "`tokenizer.json`")
    refused(4, *words, base=base, adapters=adapter)
    write_json(adapter / "tokenizer.json", tokenizer(VOCABULARY - 3, gap=7))
    refused(4, "the adapter's tokenizer has 28 ids", base=base, adapters=adapter)
    write_json(adapter / "tokenizer.json", tokenizer(VOCABULARY))
    merged(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()


def test_a_trained_token_beyond_the_table_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    rows = {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": normal("rows", 2, HIDDEN)}
    adapter = make_adapter(tmp_path / "adapter", all_factors() | rows, trainable_token_indices=[3, VOCABULARY])
    words = (
        "the adapter trains token 24, `model.embed_tokens.weight` in the base has 24 rows",
        "the base's embeddings were resized for training",
    )
    refused(4, *words, base=base, adapters=adapter)


def test_token_rows_that_do_not_fit_their_list_or_their_table_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    key = f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = {key: normal("rows", 2, HIDDEN)}
    adapter = make_adapter(tmp_path / "long", all_factors() | rows, trainable_token_indices=[1, 2, 3])
    refused(4, f"`{key}` has shape [2, 16], the config lists 3 token indices", base=base, adapters=adapter)
    rows = {key: normal("rows", 2, HIDDEN + 1)}
    adapter = make_adapter(tmp_path / "wide", all_factors() | rows, trainable_token_indices=[1, 2])
    refused(4, "the token rows have width 17", base=base, adapters=adapter)


def test_one_table_resized_and_the_other_not_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    larger = {f"{PREFIX}model.embed_tokens.weight": normal("table", VOCABULARY + 4, HIDDEN)}
    adapter = make_adapter(tmp_path / "adapter", all_factors() | larger)
    words = (
        "the adapter brings `model.embed_tokens.weight` with 28 rows, `lm_head.weight` keeps the base's 24",
        "merge into a base whose embeddings were resized",
    )
    refused(4, *words, base=base, adapters=adapter)


def test_a_replacement_of_another_shape_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    key = f"{PREFIX}model.norm.weight"
    adapter = make_adapter(tmp_path / "adapter", all_factors() | {key: normal("norm", HIDDEN + 1)})
    words = (f"`{key}` has shape [17], `model.norm.weight` in the base has shape [16]",)
    refused(4, *words, base=base, adapters=adapter)


def test_a_factor_for_an_embedding_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    module = f"{PREFIX}model.embed_tokens"
    pair = {
        f"{module}.lora_embedding_A": normal("A", RANK, VOCABULARY + 1),
        f"{module}.lora_embedding_B": normal("B", HIDDEN, RANK),
    }
    words = ("A [2, 25] and B [16, 2]", "the base has another vocabulary than the adapter's")
    refused(4, *words, base=base, adapters=make_adapter(tmp_path / "adapter", pair))


@pytest.mark.parametrize("ranges", [[[0, 3]], [[0, 2], [1, 9]]])
def test_a_replication_of_layers_that_are_not_there_is_refused(tmp_path: Path, ranges: list[list[int]]) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", layer_replication=ranges)
    last = max(end for _, end in ranges) - 1
    refused(4, f"the adapter replicates layer {last}, the base has 2 layers", base=base, adapters=adapter)


# --- quantized bases --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "future"])
def test_a_base_whose_config_says_that_it_is_quantized_is_refused(tmp_path: Path, field: str, method: str) -> None:
    base = make_base(tmp_path / "base", changes={field: {"quant_method": method, "bits": 4}})
    adapter = make_adapter(tmp_path / "adapter")
    words = (f"the base is quantized ({method}): that is not supported yet", field, ADVICE)
    refused(4, *words, base=base, adapters=adapter)


M = TARGETS[0]
SIBLINGS = {
    "bitsandbytes 4-bit": {
        f"{M}.weight.absmax": normal("x", 4),
        f"{M}.weight.quant_map": normal("x", 16),
        f"{M}.weight.quant_state.bitsandbytes__nf4": Stored("U8", (3,), b"{} "),
    },
    "bitsandbytes int8": {f"{M}.SCB": normal("x", HIDDEN)},
    "GPTQ or AWQ": {
        f"{M}.qweight": Stored("I32", (2, HIDDEN), bytes(8 * HIDDEN)),
        f"{M}.qzeros": Stored("I32", (1, 2), bytes(8)),
        f"{M}.scales": normal("x", 1, HIDDEN, dtype="F16"),
        f"{M}.g_idx": Stored("I32", (HIDDEN,), bytes(4 * HIDDEN)),
    },
    "block FP8": {f"{M}.weight_scale_inv": normal("x", 1, 1)},
    "FP8": {f"{M}.weight_scale": normal("x", HIDDEN, 1)},
    "MXFP4": {
        "model.layers.0.mlp.experts.up_proj_blocks": Stored("U8", (1, 2, 1, 16), bytes(32)),
        "model.layers.0.mlp.experts.up_proj_scales": Stored("U8", (1, 2, 1), bytes(2)),
    },
    "NVFP4": {f"{M}.weight_scale_2": normal("x", 1)},
    "compressed-tensors": {
        f"{M}.weight_packed": Stored("I32", (HIDDEN, 2), bytes(8 * HIDDEN)),
        f"{M}.weight_shape": Stored("I32", (2,), bytes(8)),
    },
    "HQQ": {f"{M}.W_q": Stored("U8", (8, HIDDEN), bytes(8 * HIDDEN)), f"{M}.zero": normal("x", 8)},
    "torchao": {f"{M}._weight_qdata": Stored("I8", (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN))},
}


@pytest.mark.parametrize("scheme", SIBLINGS)
def test_a_base_with_a_schemes_companion_tensors_is_refused_by_that_scheme(tmp_path: Path, scheme: str) -> None:
    base = make_base(tmp_path / "base", base_tensors() | SIBLINGS[scheme], shards=1)
    words = (f"the base is quantized ({scheme}): that is not supported yet", ADVICE)
    refused(4, *words, base=base, adapters=make_adapter(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("dtype", "words"), [("I8", "stored as I8: not a float dtype"), ("F8_E4M3", "stored as F8_E4M3: a quantized dtype")]
)
def test_a_target_that_is_no_float_is_refused(tmp_path: Path, dtype: str, words: str) -> None:
    tensors = base_tensors() | {Q0: Stored(dtype, (HIDDEN, HIDDEN), bytes(HIDDEN * HIDDEN))}
    base = make_base(tmp_path / "base", tensors)
    refused(4, f"the adapter changes `{Q0}`", words, base=base, adapters=make_adapter(tmp_path / "adapter"))


# --- ties -------------------------------------------------------------------------------------------------------------
def t5(root: Path, architecture: str = "T5ForConditionalGeneration", model_type: str = "t5", **changes: object) -> Path:
    tensors = {
        "shared.weight": normal("shared", VOCABULARY, HIDDEN, dtype="BF16"),
        "encoder.block.0.layer.0.SelfAttention.q.weight": normal("q", HIDDEN, HIDDEN, dtype="BF16"),
    }
    config = {"architectures": [architecture], "model_type": model_type, "d_model": HIDDEN, "vocab_size": VOCABULARY}
    write_json(root / "config.json", {**config, "tie_word_embeddings": True, **changes})
    make_base(root, tensors, shards=1)
    write_json(root / "config.json", {**config, "tie_word_embeddings": True, **changes})
    return root


def test_a_tie_whose_flag_the_forward_pass_uses_cannot_be_undone(tmp_path: Path) -> None:
    base = t5(tmp_path / "base")
    head = {
        f"{PREFIX}lm_head.lora_A.weight": normal("A", RANK, HIDDEN),
        f"{PREFIX}lm_head.lora_B.weight": normal("B", VOCABULARY, RANK),
    }
    adapter = make_adapter(tmp_path / "adapter", head, task_type="SEQ_2_SEQ_LM")
    words = (
        "one side of the tie between `shared.weight` and `lm_head.weight`",
        "T5ForConditionalGeneration uses `tie_word_embeddings` in its forward pass",
    )
    refused(4, *words, base=base, adapters=adapter)


def test_the_same_tie_is_no_obstacle_to_an_adapter_that_leaves_it_alone(tmp_path: Path) -> None:
    base = t5(tmp_path / "base")
    module = "encoder.block.0.layer.0.SelfAttention.q"
    pair = {
        f"{PREFIX}{module}.lora_A.weight": normal("A", RANK, HIDDEN),
        f"{PREFIX}{module}.lora_B.weight": normal("B", HIDDEN, RANK),
    }
    merged(base, make_adapter(tmp_path / "adapter", pair, task_type="SEQ_2_SEQ_LM"), tmp_path / "out")
    assert load_all(tmp_path / "out")["shared.weight"] == load_all(base)["shared.weight"]


EMBEDDING = {
    f"{PREFIX}model.embed_tokens.lora_embedding_A": normal("A", RANK, VOCABULARY),
    f"{PREFIX}model.embed_tokens.lora_embedding_B": normal("B", HIDDEN, RANK),
}


def test_a_class_with_ties_that_are_no_pairs_of_names_is_not_untied(tmp_path: Path) -> None:
    changes = {"architectures": ["ZambaForCausalLM"], "model_type": "zamba", "tie_word_embeddings": True}
    base = make_base(tmp_path / "base", base_tensors(head=False), changes=changes)
    words = ("one side of the tie between `model.embed_tokens.weight`", "other ties that `tie_word_embeddings` would")
    refused(4, *words, base=base, adapters=make_adapter(tmp_path / "embedding", EMBEDDING))
    merged(base, make_adapter(tmp_path / "adapter"), tmp_path / "out")


def test_an_unknown_class_that_says_its_embeddings_are_tied_is_refused_for_them(tmp_path: Path) -> None:
    changes = {"architectures": ["NewForCausalLM"], "model_type": "new", "tie_word_embeddings": True}
    base = make_base(tmp_path / "base", base_tensors(head=False), changes=changes)
    words = ("the adapter changes `model.embed_tokens.weight`", "embeddings are tied", "not in the table of ties")
    refused(4, *words, base=base, adapters=make_adapter(tmp_path / "adapter", EMBEDDING))
    outcome = merged(base, make_adapter(tmp_path / "attention"), tmp_path / "out")
    assert "`NewForCausalLM` is not in the table of architectures" in outcome.err


# --- heads ------------------------------------------------------------------------------------------------------------
def test_a_head_that_the_base_does_not_have_is_written_as_a_new_tensor_and_said(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    head = normal("score", 3, HIDDEN)
    adapter = make_adapter(tmp_path / "adapter", all_factors() | {f"{PREFIX}score.weight": head}, task_type="SEQ_CLS")
    outcome = merged(base, adapter, tmp_path / "out")
    assert "note: `score.weight` is not in the base and is written as a new tensor" in outcome.err
    assert load_all(tmp_path / "out")["score.weight"] == head
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 3


def test_a_head_that_nothing_declares_is_an_unmatched_key(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    key = f"{PREFIX}probe.weight"
    adapter = make_adapter(tmp_path / "adapter", all_factors() | {key: normal("probe", 3, HIDDEN)})
    refused(4, "1 of 9 adapter keys match no tensor in the base", key, base=base, adapters=adapter)
    words = ("the adapter changes nothing: none of its tensors has a target",)
    adapter = make_adapter(tmp_path / "head only", {key: normal("probe", 3, HIDDEN)})
    refused(4, *words, base=base, adapters=adapter, options=("--allow-unused", "*"))


def test_a_value_head_is_refused_unless_it_may_be_left_over(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    head = {"v_head.summary.weight": normal("v", 1, HIDDEN), "v_head.summary.bias": normal("v", 1)}
    adapter = make_adapter(tmp_path / "adapter", all_factors() | head)
    words = ("the adapter holds a value head", "`--allow-unused '*v_head*'`", "v_head.summary.weight")
    refused(4, *words, base=base, adapters=adapter)
    outcome = call("plan", base, adapter, "--allow-unused", "*v_head*")
    assert "ignored   v_head.summary.weight (allowed to be left over by --allow-unused)" in outcome.out
    merged(base, adapter, tmp_path / "out", "--allow-unused", "*v_head*")
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    assert set(report["adapters"][0]["ignored"]) == head.keys()
    assert report["options"]["allow_unused"] == ["*v_head*"]
    assert "v_head.summary.weight" not in load_all(tmp_path / "out")


def test_a_glob_that_does_not_match_every_leftover_does_not_help(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    extra = {f"{PREFIX}probe.weight": normal("p", 2), f"{PREFIX}other.weight": normal("o", 2)}
    adapter = make_adapter(tmp_path / "adapter", all_factors() | extra)
    outcome = refused(4, "1 of 10 adapter keys", base=base, adapters=adapter, options=("--allow-unused", "*probe*"))
    assert "probe" not in outcome.err
