"""Text from files cannot act on a terminal, nor hide: whatever is printed of it is escaped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.refusals.making import (
    HIDDEN,
    PREFIX,
    all_factors,
    base_tensors,
    call,
    factors,
    inputs_at,
    make_adapter,
    make_base,
    merged,
    normal,
    save,
    write_json,
)

HOSTILE = {
    "a terminal's escape": ("\x1b[2J", "\\x1b[2J"),
    "a line feed": ("a\nerror: forged", "a\\nerror: forged"),
    "a carriage return": ("a\rb", "a\\rb"),
    "a bidirectional override": ("a\u202eb", "a\\u202eb"),
    "a zero-width space": ("a\u200bb", "a\\u200bb"),
    "a C1 control": ("a\x9b2Jb", "a\\x9b2Jb"),
    "a line separator": ("a\u2028b", "a\\u2028b"),
}


def harmless(text: str) -> bool:
    return not any(char in text for char in "\x1b\r\u202e\u200b\x9b\u2028") and "\nerror: forged" not in text


@pytest.mark.parametrize(("text", "escaped"), HOSTILE.values(), ids=HOSTILE)
def test_a_value_of_an_adapters_config_is_escaped(tmp_path: Path, text: str, escaped: str) -> None:
    base, adapter = inputs_at(tmp_path, init_lora_weights=text)
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 4
    assert escaped in outcome.err
    assert harmless(outcome.err)


@pytest.mark.parametrize(("text", "escaped"), HOSTILE.values(), ids=HOSTILE)
def test_a_field_name_of_an_adapters_config_is_escaped_in_the_hint_too(tmp_path: Path, text: str, escaped: str) -> None:
    base, adapter = inputs_at(tmp_path, **{text: 1})
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 4
    assert outcome.err.count(escaped) >= 2
    assert harmless(outcome.err)


@pytest.mark.parametrize("text", ["a\u202eb", "a\u200bb", "a\u2028b"])
def test_an_adapter_key_that_hides_its_name_is_escaped_or_refused(tmp_path: Path, text: str) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", all_factors() | {f"{PREFIX}{text}.weight": normal("x", HIDDEN)})
    for outcome in (call("run", base, adapter, "-o", tmp_path / "out"), call("inspect", adapter, "--base", base)):
        assert outcome.code in (3, 4)
        assert text.encode("unicode_escape").decode() in outcome.err
        assert harmless(outcome.out + outcome.err)


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\x9bb"])
def test_control_characters_in_an_adapter_key_are_refused(tmp_path: Path, text: str) -> None:
    base, adapter = inputs_at(tmp_path)
    save(adapter / "adapter_model.safetensors", all_factors() | {f"{PREFIX}{text}.weight": normal("x", HIDDEN)})
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "control character" in outcome.err
    assert harmless(outcome.err)


def test_a_tensor_name_of_the_base_is_escaped_where_it_is_suggested(tmp_path: Path) -> None:
    names = {f"model.layers.{n}.self_attn.q\u202e_proj.weight": normal("x", HIDDEN, HIDDEN) for n in range(2)}
    base, adapter = make_base(tmp_path / "base", names, shards=1), make_adapter(tmp_path / "adapter")
    outcome = call("run", base, adapter, "-o", tmp_path / "out")
    assert outcome.code == 4
    assert "q\\u202e_proj.weight" in outcome.err
    assert harmless(outcome.err)


def test_names_in_plans_and_progress_are_escaped(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / "code\u202eyp.py").write_text("x = 1\n")
    changes = {"architectures": ["A\u202eB"], "model_type": "ab", "sub\u202econfig": {"dtype": "bfloat16"}}
    write_json(base / "config.json", {**json.loads((base / "config.json").read_text()), **changes})
    outcome = call("plan", base, adapter)
    assert "code\\u202eyp.py is copied" in outcome.out
    assert "`A\\u202eB` is not in the table" in outcome.out
    assert harmless(outcome.out)
    assert harmless(merged(base, adapter, tmp_path / "out").err)
    outcome = call("plan", base, adapter, "--dtype", "float32")
    assert "sub\\u202econfig.dtype = 'float32'" in outcome.out
    assert harmless(outcome.out)


def test_a_tensor_that_lost_most_of_its_delta_is_named_escaped(tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q\u202e_proj"
    base = make_base(tmp_path / "base", {f"{module}.weight": normal("x", HIDDEN, HIDDEN, dtype="BF16")}, shards=1)
    pair = {key: normal(key, *value.shape, scale=0.01) for key, value in factors(module).items()}
    outcome = merged(base, make_adapter(tmp_path / "adapter", pair), tmp_path / "out")
    assert "least is left of `model.layers.0.self_attn.q\\u202e_proj.weight`" in outcome.err
    assert harmless(outcome.err)


def test_a_path_that_was_typed_is_escaped_in_errors_and_whole_in_results(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "ba\u202ese"), make_adapter(tmp_path / "adapter")
    outcome = call("run", tmp_path / "no\x1b[1mne", adapter, "-o", tmp_path / "out")
    assert outcome.code == 3
    assert "no\\x1b[1mne" in outcome.err
    assert harmless(outcome.err)
    (tmp_path / "o\u202eut").mkdir()
    (tmp_path / "o\u202eut" / "mine\x1b").touch()
    outcome = call("run", base, adapter, "-o", tmp_path / "o\u202eut")
    assert outcome.code == 5
    assert harmless(outcome.err)


def test_json_carries_hostile_text_as_it_is_for_programs(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", base_tensors())
    adapter = make_adapter(tmp_path / "adapter", all_factors() | {f"{PREFIX}a\u202eb.weight": normal("x", HIDDEN)})
    error = json.loads(call("run", base, adapter, "-o", tmp_path / "out", "--json").out)
    assert error["unmatched"][0]["key"] == f"{PREFIX}a\u202eb.weight"
