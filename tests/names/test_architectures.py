"""The table of architectures says what transformers does, and cannot be changed by who reads it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streammerge.core.errors import NotMergeableError
from streammerge.names.architectures import DATA, Architecture, architecture_of, sibling

ROOT = Path(__file__).parents[2]
SHIPPED: dict[str, Any] = json.loads(DATA.read_bytes())
FAMILIES = ["llama", "gpt2", "t5", "bart", "qwen2_vl", "gpt_oss", "llava", "florence2", "blip_2", "csm"]
FLAG = ("tie_word_embeddings",)
TEXT_FLAG = ("text_config", "tie_word_embeddings")
EMBED_TO_HEAD = {"lm_head.weight": "model.embed_tokens.weight"}
VLM_TIE = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
T5_TIES = {f"{name}.weight": "shared.weight" for name in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")}


def known(config: dict[str, Any]) -> Architecture:
    found = architecture_of(config)
    assert found is not None
    return found


def named(name: str, **fields: Any) -> Architecture:
    return known({"architectures": [name], **fields})


# --- what is known ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "model_type", "prefix", "tied", "default"),
    [
        ("LlamaForCausalLM", "llama", "model", EMBED_TO_HEAD, False),
        ("LlamaModel", "llama", "model", {}, False),
        ("GPT2LMHeadModel", "gpt2", "transformer", {"lm_head.weight": "transformer.wte.weight"}, True),
        ("GemmaForCausalLM", "gemma", "model", EMBED_TO_HEAD, True),
        ("MixtralForCausalLM", "mixtral", "model", EMBED_TO_HEAD, False),
        ("GptOssForCausalLM", "gpt_oss", "model", EMBED_TO_HEAD, False),
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", "model", VLM_TIE, False),
        ("Gemma3ForConditionalGeneration", "gemma3", "model", VLM_TIE, True),
        ("Gemma3ForCausalLM", "gemma3_text", "model", EMBED_TO_HEAD, True),
        ("T5ForConditionalGeneration", "t5", "transformer", T5_TIES, True),
    ],
)
def test_prefix_ties_and_default_of_known_classes(
    name: str, model_type: str, prefix: str, tied: dict[str, str], default: bool
) -> None:
    found = named(name, model_type=model_type)
    assert (found.name, found.model_type, found.base_prefix) == (name, model_type, prefix)
    assert dict(found.tied) == tied
    assert found.tie_default is (default and bool(tied))
    assert found.ties_in_force({"model_type": model_type}) is (default and bool(tied))


def test_bert_ties_the_bias_of_its_head_too() -> None:
    assert dict(named("BertForMaskedLM", model_type="bert").tied) == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


def test_ties_of_models_inside_a_model_are_its_own() -> None:
    shared = "model.shared.weight"
    assert dict(named("BartForConditionalGeneration", model_type="bart").tied) == {
        "lm_head.weight": shared,
        "model.encoder.embed_tokens.weight": shared,
        "model.decoder.embed_tokens.weight": shared,
    }
    config = {"architectures": ["Blip2ForConditionalGeneration"], "text_config": {"model_type": "opt"}}
    tie = {"language_model.lm_head.weight": "language_model.model.decoder.embed_tokens.weight"}
    assert dict(known(config).tied) == tie
    assert known(config).untie(config) == [(TEXT_FLAG, False)]


def test_the_forward_pass_of_t5_and_its_kin_uses_the_flag() -> None:
    users = {name for name, row in SHIPPED["classes"].items() if row.get("flag_used")}
    kin = ["T5", "LongT5", "UMT5", "Pop2Piano", "SwitchTransformers", "Udop"]
    assert users == {f"{name}ForConditionalGeneration" for name in kin}
    assert not named("T5EncoderModel", model_type="t5").flag_used


STACKED = (("gate_up_proj", "down_proj"),)


@pytest.mark.parametrize(
    ("config", "params", "transposed"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, STACKED, False),
        ({"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}, STACKED, True),
        ({"model_type": "openai_privacy_filter"}, STACKED, True),
        ({"model_type": "aria", "text_config": {"model_type": "aria_text"}}, STACKED, True),
        ({"model_type": "llava", "text_config": {"model_type": "mixtral"}}, STACKED, False),
        ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}}, STACKED, False),
        ({"model_type": "nemotron_h"}, (("up_proj", "down_proj"),), False),
        ({"model_type": "dbrx"}, (("w1", "v1", "w2"),), False),
        ({"model_type": "llama"}, (), False),
    ],
)
def test_expert_parameters_are_known_in_registration_order(
    config: dict[str, Any], params: tuple[tuple[str, ...], ...], transposed: bool
) -> None:
    assert (known(config).expert_orders, known(config).experts_transposed) == (params, transposed)


def test_modules_that_store_their_weight_transposed_are_known() -> None:
    assert known({"model_type": "gpt2"}).conv1d == {"c_attn", "c_proj", "c_fc", "q_attn"}
    assert known({"model_type": "llama"}).conv1d == frozenset()


# --- which class a config.json means -------------------------------------------------------------------------------
def test_architectures_decides_before_the_model_type() -> None:
    assert named("LlamaForSequenceClassification", model_type="llama").name == "LlamaForSequenceClassification"
    assert known({"model_type": "llama"}).name == "LlamaForCausalLM"
    assert named("MyLlamaForCausalLM", model_type="llama").name == "LlamaForCausalLM"
    assert known({"model_type": "bart"}).name == "BartForConditionalGeneration"


def test_class_and_type_may_stand_in_the_text_config_only() -> None:
    text = {"model_type": "qwen2_vl_text", "architectures": ["Qwen2VLForConditionalGeneration"]}
    assert known({"model_type": "qwen2_vl", "text_config": text}).name == "Qwen2VLForConditionalGeneration"
    assert known({"text_config": {"model_type": "llama"}}).name == "LlamaForCausalLM"
    inner = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    assert known({"model_type": "llava", "text_config": inner}).name == "LlavaForConditionalGeneration"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "nothing"},
        {"architectures": ["Nothing"]},
        {"architectures": 3, "model_type": []},
        {"architectures": [], "text_config": 1},
        {"architectures": [None], "model_type": None},
    ],
)
def test_an_unknown_architecture_is_none(config: dict[str, Any]) -> None:
    assert architecture_of(config) is None


def test_the_sibling_of_a_class_is_found_by_its_ending() -> None:
    assert sibling("llama", "ForSequenceClassification") == "LlamaForSequenceClassification"
    assert sibling("bert", "ForTokenClassification") == "BertForTokenClassification"
    assert sibling("llama", "ForMaskedLM") is None
    assert sibling("nothing", "ForCausalLM") is None
    assert known({"model_type": "gpt2"}).sibling("ForSequenceClassification") == "GPT2ForSequenceClassification"


# --- the flag --------------------------------------------------------------------------------------------------------
def test_the_flag_outside_decides_for_a_language_model() -> None:
    llama = known({"model_type": "llama"})
    assert llama.tie_flag_paths == (FLAG,)
    assert llama.ties({"model_type": "llama", "tie_word_embeddings": True}) == EMBED_TO_HEAD
    assert llama.untie({"model_type": "llama", "tie_word_embeddings": True}) == [(FLAG, False)]
    assert llama.untie({"model_type": "llama"}) == []
    assert known({"model_type": "gemma"}).untie({"model_type": "gemma"}) == [(FLAG, False)]


def test_either_flag_ties_qwen2_vl_and_both_must_go() -> None:
    config = {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text", "tie_word_embeddings": True}}
    found = known(config)
    assert found.tie_flag_paths == (FLAG, TEXT_FLAG)
    assert found.ties_in_force(config)
    assert found.untie(config) == [(FLAG, False), (TEXT_FLAG, False)]
    assert config["text_config"]["tie_word_embeddings"] is True
    flat = {"model_type": "qwen2_vl", "tie_word_embeddings": True}
    assert known(flat).untie(flat) == [(FLAG, False)]


def test_the_default_of_the_language_model_inside_counts() -> None:
    tied = {"model_type": "llava", "text_config": {"model_type": "gemma"}}
    assert known(tied).ties_in_force(tied)
    untied = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    assert not known(untied).ties_in_force(untied)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "switch_transformers"])
def test_what_the_flag_cannot_untie_is_refused(model_type: str) -> None:
    config = {"model_type": model_type, "tie_word_embeddings": True}
    with pytest.raises(NotMergeableError, match="ForConditionalGeneration"):
        known(config).untie(config)


@pytest.mark.parametrize("outside", [None, True, False])
@pytest.mark.parametrize("inside", [None, True, False])
@pytest.mark.parametrize(
    ("model_type", "text_type"),
    [
        ("llama", None),
        ("gpt2", None),
        ("t5", None),
        ("llava", "llama"),
        ("llava", "gemma"),
        ("gemma3", "gemma3_text"),
        ("qwen2_vl", "qwen2_vl_text"),
        ("paddleocr_vl", "paddleocr_vl_text"),
        ("perception_lm", "llama"),
        ("shieldgemma2", "gemma3_text"),
        ("florence2", "bart"),
    ],
)
def test_the_flag_is_what_transformers_reads(
    model_type: str, text_type: str | None, outside: bool | None, inside: bool | None
) -> None:
    transformers = reference()
    config: dict[str, Any] = {} if outside is None else {"tie_word_embeddings": outside}
    if text_type:
        config["text_config"] = {"model_type": text_type} | ({} if inside is None else {"tie_word_embeddings": inside})
    read = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(config)))
    found = known({"model_type": model_type, **config})
    outer = {**config, "model_type": model_type}
    assert any(not group.config_path for group in found.groups)
    pairs = {target for group in found.groups if not group.config_path for target in group.pairs}
    assert (pairs <= found.ties(outer).keys()) is bool(read.tie_word_embeddings)


@pytest.mark.parametrize("kind", ["plain", "flag outside", "flag inside", "default"])
def test_transformers_keeps_both_sides_after_the_edits(kind: str, tmp_path: Path) -> None:
    transformers = reference()
    import torch
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity_error()
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    found = known(config)
    assert found.ties(config) == found.tied
    for path, value in found.untie(config):
        section = config
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    source = model.state_dict()[found.tied["lm_head.weight"]]
    tensors["lm_head.weight"] = torch.arange(float(source.numel())).reshape(source.shape)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not loaded.all_tied_weights_keys
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(loaded.get_input_embeddings().weight, source)


def reference() -> Any:
    """transformers, in the version the table was made from; what another version does, the table does not claim."""
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != SHIPPED["meta"]["transformers"]:
        made = SHIPPED["meta"]["transformers"]
        pytest.skip(f"the table was made from transformers {made}, installed is {transformers.__version__}")
    return transformers


def tiny_model(kind: str) -> Any:
    import transformers

    text = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 4, "patch_size": 2}
    if kind == "plain":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, tie_word_embeddings=True))
    if kind == "default":
        config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return transformers.Gemma3ForConditionalGeneration(config)
    inside = kind == "flag inside"
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text, "tie_word_embeddings": inside},
        vision_config={"model_type": "clip_vision_model", **vision},
        tie_word_embeddings=not inside,
        image_token_index=3,
    )
    return transformers.LlavaForConditionalGeneration(config)


# --- the file --------------------------------------------------------------------------------------------------------
def test_the_generator_gives_the_shipped_rows() -> None:
    """A few families only, which import in seconds; `scripts/generate_architectures.py --check` compares all."""
    reference()
    program = f"import json, generate_architectures as g; print(json.dumps(g.table({FAMILIES!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["meta"] == SHIPPED["meta"]
    types = {model_type: row for model_type, row in made["model_types"].items() if "classes" in row}
    assert {"llama", "t5", "gpt_oss", "florence2", "csm"} <= types.keys()
    assert types == {model_type: SHIPPED["model_types"][model_type] for model_type in types}
    names = [name for row in types.values() for name in row["classes"]]
    assert made["classes"] == {name: SHIPPED["classes"][name] for name in names if name in SHIPPED["classes"]}


def test_the_file_is_small_and_has_one_row_a_line() -> None:
    lines = DATA.read_bytes().splitlines()
    assert sum(map(len, lines)) < 250_000
    assert len(lines) == len(SHIPPED["model_types"]) + len(SHIPPED["classes"]) + 7


def test_every_class_belongs_to_one_model_type() -> None:
    names = [name for row in SHIPPED["model_types"].values() for name in row.get("classes", ())]
    assert len(names) == len(set(names)) > 1900
    assert SHIPPED["classes"].keys() <= set(names)


def test_looking_an_architecture_up_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom streammerge.names.architectures import architecture_of\n"
        "architecture_of({'model_type': 'llama'})\n"
        "assert not {'torch', 'transformers', 'numpy', 'peft'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_an_architecture_cannot_be_changed() -> None:
    found = known({"model_type": "llama"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.tied["a"] = "b"  # type: ignore[index]
    with pytest.raises(TypeError):
        found.groups[0].pairs["a"] = "b"  # type: ignore[index]
    found.ties({"model_type": "llama", "tie_word_embeddings": True}).clear()
    assert dict(known({"model_type": "llama"}).tied) == EMBED_TO_HEAD
