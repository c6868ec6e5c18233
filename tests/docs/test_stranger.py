"""The mistakes that somebody makes on the first day, each with the message that helps."""

from __future__ import annotations

import json
import shutil

import pytest

from streammerge import api
from streammerge.cli import main
from streammerge.cli.demo import build


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A directory with the demo's `base` and `adapter`, and nothing else."""
    build(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, code, *arguments):
    """What a command that ends with `code` says on stdout and stderr."""
    assert main([*arguments]) == code
    return capsys.readouterr()


def test_base_and_adapter_the_wrong_way_round(desk, capsys):
    err = said(capsys, 3, "run", "adapter", "base", "-o", "out").err
    assert "`adapter` holds no weights" in err
    assert "The base comes first: `streammerge run BASE ADAPTER -o OUT`" in err
    assert not (desk / "out").exists()


@pytest.mark.parametrize("place", ["base", "adapter", "base/merged"])
def test_an_output_among_the_inputs(desk, capsys, place):
    before = sorted(desk.rglob("*"))
    assert "lie inside each other" in said(capsys, 5, "run", "base", "adapter", "-o", place).err
    assert sorted(desk.rglob("*")) == before


def test_a_misspelt_path_of_an_adapter(desk, capsys):
    assert "`./adaptr` does not exist" in said(capsys, 3, "run", "base", "./adaptr", "-o", "out").err
    assert "neither an existing path nor a Hub id" in said(capsys, 3, "run", "base", "adaptr", "-o", "out").err


def test_a_misspelt_base_that_could_be_a_hub_id_says_that_there_is_no_such_path(desk, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    err = said(capsys, 3, "run", "bse", "adapter", "-o", "out").err
    assert "if `bse` was meant as a local path, it does not exist" in err


@pytest.mark.parametrize(("typed", "meant"), [("--weigth", "--weight"), ("--max-shards=1GB", "--max-shard-size")])
def test_a_misspelt_option_is_answered_with_the_one_that_was_meant(desk, capsys, typed, meant):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "base", "adapter", "-o", "out", typed, "2"])
    assert stopped.value.code == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_an_adapter_for_a_deeper_base_names_every_key_that_is_left_over(desk, capsys):
    weight_map = json.loads((desk / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    keep = {name: file for name, file in weight_map.items() if file.startswith("model-00001")}
    shutil.copytree(desk / "base", desk / "half", ignore=shutil.ignore_patterns("model-00002*"))
    (desk / "half" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": keep}))
    found = said(capsys, 4, "inspect", "adapter", "--base", "half")
    keys = [
        f"base_model.model.model.layers.{layer}.self_attn.{module}_proj.lora_{half}.weight"
        for layer in (2, 3)
        for module in "qv"
        for half in "AB"
    ]
    assert "8 of 16 adapter keys match no tensor in the base" in found.err
    listed = found.out.split("keys without a tensor in the base:\n")[1].splitlines()
    assert [line.strip() for line in listed if not line.startswith("    ")] == keys
    assert sum(line.startswith("    nearest  model.layers.") for line in listed) >= 4
    # What has a place is shown with it.
    assert "  ->  model.layers.1.self_attn.v_proj.weight in model-00001-of-00002.safetensors\n" in found.out
    # Both halves of a pair are looked for under one name, which is said once.
    assert found.err.count("tried    model.layers.2.self_attn.q_proj.weight (exact)") == 1
    assert found.err.splitlines()[1:3] == [f"  {key}" for key in keys[:2]]


def test_inspect_prints_one_json_document_for_an_adapter_that_is_refused(desk, capsys):
    (desk / "adapter" / "adapter_config.json").write_text('{"peft_type": "XLORA"}')
    document = json.loads(said(capsys, 4, "inspect", "adapter", "--json").out)
    assert document["refusal"]["error"] == "NotMergeableError"


def test_a_weight_of_zero_is_not_blamed_on_training(desk, capsys):
    err = said(capsys, 4, "run", "base", "adapter", "-o", "out", "--weight", "0").err
    assert "the adapter changes nothing: every weight is 0" in err
    assert "untrained" not in err


def test_verifying_what_is_not_there_or_was_never_an_output(desk, capsys):
    assert "`out` does not exist: there is nothing to verify" in said(capsys, 5, "verify", "out").err
    err = said(capsys, 5, "verify", "base").err
    assert "it is not a finished output of streammerge" in err
    assert "finish it" not in err


def test_verifying_in_full_after_the_base_has_moved(desk, capsys):
    api.merge("base", "adapter", "out")
    (desk / "base").rename(desk / "moved")
    err = said(capsys, 3, "verify", "out", "--full").err
    assert f"`out` cannot be derived again: `{desk}/base`, which the output was made from, is gone" in err
    assert "verified" in said(capsys, 0, "verify", "out", "--full", "--base", "moved").out
