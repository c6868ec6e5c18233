"""What of config.json changes: only what was written demands it, and nothing around it moves."""

from __future__ import annotations

import json

import pytest

from streammerge.core.tensors import OutputTensor, Replacement
from streammerge.names.architectures import architecture_of
from streammerge.planning.config_edits import dtype_edits, edited, head_edits, vocabulary_edits

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "edits"),
    [
        ({"dtype": "bfloat16"}, [(("dtype",), "float32")]),
        ({"torch_dtype": "bfloat16"}, [(("torch_dtype",), "float32")]),
        ({"dtype": "float32"}, []),
        ({}, [(("dtype",), "float32")]),
        ({"a": 1, "text_config": {"dtype": "float16"}}, [(("text_config", "dtype"), "float32")]),
        (
            {"dtype": "bfloat16", "vision_config": {"torch_dtype": "float32"}, "text_config": {"dtype": "float16"}},
            [(("dtype",), "float32"), (("text_config", "dtype"), "float32")],
        ),
        ({"dtype": None}, [(("dtype",), "float32")]),
    ],
)
def test_every_dtype_field_follows_the_option(config: dict[str, object], edits: list[object]) -> None:
    assert dtype_edits(config, "float32") == edits
    assert dtype_edits(config, "auto") == []


@pytest.mark.parametrize(
    ("config", "edits"),
    [
        ({"vocab_size": 100}, [(("vocab_size",), 104)]),
        ({"vocab_size": 64, "text_config": {"vocab_size": 100}}, [(("text_config", "vocab_size"), 104)]),
        ({"vocab_size": 96}, [(("vocab_size",), 104)]),
        ({}, []),
    ],
)
def test_the_vocabulary_follows_the_table(config: dict[str, object], edits: list[object]) -> None:
    assert vocabulary_edits(config, [(100, 104)]) == edits
    assert vocabulary_edits(config, []) == []


def head(name: str, labels: int) -> OutputTensor:
    return OutputTensor(name, "F32", (labels, 16), Replacement(0, name))


def test_a_new_head_changes_the_class_and_the_labels() -> None:
    edits = head_edits(LLAMA, [head("score.weight", 3)], architecture_of(LLAMA), "SEQ_CLS")
    assert edits == [
        (("architectures",), ["LlamaForSequenceClassification"]),
        (("id2label",), {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}),
        (("label2id",), {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}),
    ]


def test_a_head_with_as_many_labels_as_the_config_says_leaves_their_names() -> None:
    config = {**LLAMA, "id2label": {"0": "no", "1": "yes", "2": "maybe"}}
    edits = head_edits(config, [head("score.weight", 3)], architecture_of(LLAMA), "SEQ_CLS")
    assert edits == [(("architectures",), ["LlamaForSequenceClassification"])]


def test_a_head_of_labels_for_tokens_is_of_another_class() -> None:
    edits = head_edits(LLAMA, [head("score.weight", 2)], architecture_of(LLAMA), "TOKEN_CLS")
    assert edits == [(("architectures",), ["LlamaForTokenClassification"])]


def test_a_bias_or_an_unknown_head_changes_nothing() -> None:
    for name in ("score.bias", "probe.weight"):
        assert head_edits(LLAMA, [head(name, 3)], architecture_of(LLAMA), "SEQ_CLS") == []
    assert head_edits(LLAMA, [head("score.weight", 3)], None, "SEQ_CLS") == []


def test_an_edited_config_keeps_its_order_and_its_letters() -> None:
    config = {"z": "Ünïcode", "sub": {"b": 1, "a": 2}, "a": None}
    data = edited(config, [(("sub", "a"), 3), (("new",), [1])])
    assert data.endswith(b"}\n")
    assert "Ünïcode" in data.decode()
    changed = json.loads(data)
    assert changed == {"z": "Ünïcode", "sub": {"b": 1, "a": 3}, "a": None, "new": [1]}
    assert list(changed) == ["z", "sub", "a", "new"]
    assert list(changed["sub"]) == ["b", "a"]
    assert config["sub"] == {"b": 1, "a": 2}, "the config that was read is not changed"
