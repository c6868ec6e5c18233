"""File names and what they are: which a merged checkpoint does not get, and which belong to a tokenizer."""

from __future__ import annotations

import json

import pytest

from streammerge.core.errors import MalformedInputError, UnsafeInputError
from streammerge.formats.filenames import (
    has_vocabulary,
    is_tokenizer_file,
    left_out,
    left_out_rule,
    module_folders,
    module_weights,
)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "model.pt",
        "model.pth", "tf_model.h5", "tf_model.h5.index.json", "flax_model.msgpack", "model.onnx", "onnx/config.json",
        "model.onnx_data", "q4_k.gguf", "Q4_K.GGUF", "m.ggml", "m.tflite", "rust_model.ot", "weights.npz", "model.ckpt",
        "model.ckpt.index", "model.fp16.safetensors", "model.fp16.safetensors.index.json", "fp16/model.safetensors",
        "openvino/notes.txt", "original/params.json", "consolidated.00.pth", "consolidated.safetensors",
        "consolidated.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors",
        "vision-lora/adapter_config.json", "checkpoint-500/config.json", "checkpoint-500/global_step500/state.txt",
        ".gitattributes", ".git/config", ".gitignore", ".cache/huggingface/x.lock", "sub/.cache/y", "optimizer.pt",
        "scheduler.pt", "rng_state.pth",
        "rng_state_0.pth", "trainer_state.json", "training_args.bin", "global_step7/x.txt", "latest",
        "streammerge.json", ".streammerge-inputs.json", ".streammerge/journal", "__pycache__/modeling.cpython-311.pyc",
    ],
)  # fmt: skip
def test_the_deny_list_names(name):
    assert left_out_rule(name)


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "modeling_x.py", "README.md",
        "LICENSE", "preprocessor_config.json", "chat_template.jinja", "1_Pooling/config.json", "modules.json",
        "tokenizer/tokenizer.json", "assets/picture.png", "merges.txt", "spiece.model", "originals.txt", "original",
        "latest.txt", "my_adapter_notes.md", "checkpoint.md", "voices/a.npy", "kv_cache.json", "optimizer.md",
    ],
)  # fmt: skip
def test_everything_else_is_copied(name):
    assert left_out(name) is None


def test_a_denied_folder_is_named_once_and_not_file_by_file():
    assert left_out("a/.git/objects/01/23") == ("a/.git/", "version control")
    assert left_out("original/params.json")[0] == "original/"
    assert left_out("sub/model.gguf") == ("sub/model.gguf", "weights in another format")


def test_weights_of_modules_and_components_are_kept_and_other_formats_of_them_are_not():
    names = [
        "config.json", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin",
        "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "2_Dense/model.onnx",
        "codec/config.json", "codec/model.safetensors", "codec/model.safetensors.index.json", "codec/pytorch_model.bin",
        "voice/config.json", "voice/pytorch_model.bin", "fp16/model.safetensors", "codec/training_args.bin",
        "checkpoint-5/config.json", "checkpoint-5/model.safetensors", "onnx/config.json", "onnx/x.bin",
    ]  # fmt: skip
    assert module_weights(names, {"2_Dense"}) == {
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "codec/model.safetensors",
        "codec/model.safetensors.index.json",
        "voice/pytorch_model.bin",
    }


def test_the_folders_of_modules_json():
    modules = [{"idx": 0, "path": "", "type": "a"}, {"path": "1_Pooling"}, {"path": "./x//2_Dense/"}]
    assert module_folders(json.dumps(modules).encode(), "modules.json") == {"1_Pooling", "x/2_Dense"}


@pytest.mark.parametrize("path", ["../x", "/etc", "a/../../b", "a\\b"])
def test_a_module_folder_outside_the_checkpoint_is_refused(path):
    with pytest.raises(UnsafeInputError, match="could lead outside"):
        module_folders(json.dumps([{"path": path}]).encode(), "modules.json")


@pytest.mark.parametrize("data", [b"{}", b"3", b'["a"]', b'[{"path": 3}]', b"[", b"", b'[], "modules": []'])
def test_a_malformed_modules_json_is_refused(data):
    with pytest.raises(MalformedInputError):
        module_folders(data, "modules.json")


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json", "merges.txt", "vocab.txt",
        "spiece.model", "sentencepiece.bpe.model", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja",
        "tekken.json", "qwen.tiktoken",
    ],
)  # fmt: skip
def test_these_belong_to_a_tokenizer(name):
    assert is_tokenizer_file(name)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenization_x.py",
        "tokenizer/tokenizer.json",
        "additional_chat_templates/x.py",
        "processor_config.json",
    ],
)
def test_these_do_not_belong_to_a_tokenizer(name):
    assert not is_tokenizer_file(name)


def test_a_config_and_a_template_are_no_vocabulary():
    part = [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "merges.txt",
    ]
    assert not has_vocabulary(part)
    assert has_vocabulary([*part, "spiece.model"])
