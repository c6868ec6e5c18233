"""Whatever stands in a field of a config or an index, the answer is a result or a refusal, never a traceback."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from streammerge import api
from streammerge.core.errors import StreamMergeError
from tests.refusals.making import ADAPTER_CONFIG, BASE_CONFIG, CONFIG, INDEX, inputs_at, write_json

ODD: tuple[Any, ...] = (
    None, True, -1, 1e300, 10**30, "", "x", [], [None], [[]], ["x"], [1, 2], {}, {"x": 1}, {"x": {}}, {"(": None},
)  # fmt: skip
BASE_FIELDS = (
    *CONFIG, "quantization_config", "compression_config", "text_config", "thinker_config", "id2label", "num_labels",
    "auto_map", "torch_dtype", "layer_types", "is_encoder_decoder", "decoder", "n_layer",
)  # fmt: skip
ADAPTER_FIELDS = (
    *ADAPTER_CONFIG, "use_rslora", "use_dora", "lora_bias", "bias", "fan_in_fan_out", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "target_parameters", "modules_to_save", "layer_replication",
    "trainable_token_indices", "ensure_weight_tying",
    "base_model_name_or_path", "eva_config", "auto_mapping", "megatron_core",
)  # fmt: skip


def answered(base: Path, adapter: Path, what: str, **options: str) -> None:
    """A plan or a refusal; whatever else is raised is a bug."""
    try:
        with contextlib.suppress(StreamMergeError):
            api.plan(base, adapter, **options)
    except Exception as error:
        pytest.fail(f"{what}: {error!r}")


@pytest.mark.parametrize("field", BASE_FIELDS)
def test_any_value_in_a_bases_config_is_planned_or_refused(tmp_path: Path, field: str) -> None:
    base, adapter = inputs_at(tmp_path)
    for value in ODD:
        write_json(base / BASE_CONFIG, {**CONFIG, field: value})
        answered(base, adapter, f"{field} = {value!r}", dtype="float32")


@pytest.mark.parametrize("field", ADAPTER_FIELDS)
def test_any_value_in_an_adapters_config_is_planned_or_refused(tmp_path: Path, field: str) -> None:
    base, adapter = inputs_at(tmp_path)
    for value in ODD:
        write_json(adapter / "adapter_config.json", {**ADAPTER_CONFIG, field: value})
        answered(base, adapter, f"{field} = {value!r}")
        api.inspect(adapter)


@pytest.mark.parametrize("field", ["metadata", "weight_map"])
def test_any_value_in_an_index_is_planned_or_refused(tmp_path: Path, field: str) -> None:
    base, adapter = inputs_at(tmp_path)
    healthy = json.loads((base / INDEX).read_text())
    for value in ODD:
        write_json(base / INDEX, {**healthy, field: value})
        answered(base, adapter, f"{field} = {value!r}")
        write_json(base / INDEX, {**healthy, "weight_map": {**healthy["weight_map"], "model.norm.weight": value}})
        answered(base, adapter, f"weight_map[...] = {value!r}")
        write_json(base / INDEX, {**healthy, "metadata": {"total_size": value, "total_parameters": value}})
        answered(base, adapter, f"total_size = {value!r}")


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_any_tokenizer_file_of_an_adapter_is_planned_or_refused(tmp_path: Path, file: str) -> None:
    base, adapter = inputs_at(tmp_path)
    write_json(adapter / "vocab.json", {"a": 0})
    for value in ODD:
        write_json(adapter / file, value)
        answered(base, adapter, f"{file}: {value!r}")
        write_json(adapter / file, {"model": value, "added_tokens": value, "x": value})
        answered(base, adapter, f"{file} holds {value!r}")
        write_json(adapter / file, {"model": {"vocab": value, "merges": value}, "added_tokens": [value]})
        answered(base, adapter, f"{file} holds deep {value!r}")


@pytest.mark.parametrize("value", [*ODD, [{"path": 1}], [{"path": "../x"}], [{"path": "/etc"}], [{"path": "a"}]])
def test_any_modules_json_is_planned_or_refused(tmp_path: Path, value: object) -> None:
    base, adapter = inputs_at(tmp_path)
    write_json(base / "modules.json", value)
    answered(base, adapter, f"modules.json: {value!r}")
