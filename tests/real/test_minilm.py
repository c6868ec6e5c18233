"""A real sentence encoder: a safetensors file with an integer buffer, sidecars in folders, one factor B of zeros."""

import json

import pytest
from safetensors import safe_open
from transformers import AutoModel

from streammerge.formats.safetensors import read_header
from tests.real.reference import largest_error, merged_by_peft, stored, streammerge, streammerge_json

BUFFER = "embeddings.position_ids"
POOLER = "pooler.dense"


@pytest.fixture(scope="module")
def targets(minilm_base, minilm_adapter):
    """Module to what `inspect` says of it."""
    status = streammerge_json("inspect", minilm_adapter, "--base", minilm_base)
    assert status["refusal"] is None
    return {module["module"]: module for module in status["modules"]}


def raw_tensors(directory):
    """The stored bytes of every tensor."""
    data = (directory / "model.safetensors").read_bytes()
    header = read_header(directory / "model.safetensors", "model.safetensors")
    return {info.name: data[info.start : info.start + info.nbytes] for info in header.tensors}


def test_the_output_is_what_peft_merges(minilm_base, minilm_adapter, minilm_merged):
    ours = stored(minilm_merged)
    buffer = ours.pop(BUFFER)
    assert buffer.tolist() == [list(range(512))]
    assert largest_error(ours, merged_by_peft(AutoModel, minilm_base, minilm_adapter)) < 2e-6


def test_37_modules_match_and_the_one_with_a_zero_b_is_said_to_be(targets):
    assert len(targets) == 37
    assert [name for name, module in targets.items() if module["zero"]] == [POOLER]
    changed = {target["tensor"] for module in targets.values() for target in module["targets"]}
    assert changed == {f"{name}.weight" for name in targets}


def test_the_plan_counts_the_zero_b(minilm_base, minilm_adapter):
    assert "37 operations (1 of them zero: B = 0)" in streammerge("plan", minilm_base, minilm_adapter)


def test_36_tensors_change_and_all_others_are_the_bases_bytes(minilm_base, minilm_merged, targets):
    before, after = raw_tensors(minilm_base), raw_tensors(minilm_merged)
    assert list(before) == list(after)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{name}.weight" for name in targets if name != POOLER}
    assert len(changed) == 36
    assert BUFFER not in changed


def test_the_header_is_the_bases_byte_for_byte(minilm_base, minilm_merged):
    before, after = (
        read_header(d / "model.safetensors", "model.safetensors").raw for d in (minilm_base, minilm_merged)
    )
    assert before == after
    with safe_open(minilm_merged / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice(BUFFER).get_dtype() == "I64"


def test_sidecars_are_copied_with_their_folders(minilm_base, minilm_merged):
    expected = {
        "1_Pooling/config.json", "README.md", "config.json", "config_sentence_transformers.json", "data_config.json",
        "modules.json", "sentence_bert_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.txt",
    }  # fmt: skip
    there = {path.relative_to(minilm_merged).as_posix() for path in minilm_merged.rglob("*") if path.is_file()}
    assert there == expected | {"model.safetensors", "streammerge.json", ".streammerge-inputs.json"}
    for name in expected:
        assert (minilm_merged / name).read_bytes() == (minilm_base / name).read_bytes()
    left_out = json.loads((minilm_merged / "streammerge.json").read_text())["left_out"]
    assert left_out == {".gitattributes": "version control"}


def test_transformers_loads_it_without_missing_or_unexpected_names(minilm_merged):
    model, loading = AutoModel.from_pretrained(minilm_merged, output_loading_info=True)
    assert type(model).__name__ == "BertModel"
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]


def test_the_output_verifies_in_full(minilm_merged):
    report = streammerge_json("verify", minilm_merged, "--full")
    assert (report["status"], report["blocks_rederived"]) == ("verified", 2)
