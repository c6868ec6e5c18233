"""Which tensor goes into which file: the base's own order and files, or full ones of the size that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streammerge import api
from streammerge.core.errors import CompositionError
from tests.refusals.making import (
    HIDDEN,
    INDEX,
    PREFIX,
    all_factors,
    base_tensors,
    inputs_at,
    load,
    make_adapter,
    make_base,
    normal,
    shard_name,
    write_json,
)

FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


def index_of(plan: api.MergePlan) -> dict[str, dict[str, object]]:
    assert plan.index is not None
    found: dict[str, dict[str, object]] = json.loads(plan.index)
    return found


def test_files_offsets_and_sizes_are_the_bases(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    plan = api.plan(base, adapter)
    for shard in plan.shards:
        data = (base / shard.file).read_bytes()
        assert shard.size == len(data)
        assert data.startswith(shard.header)
        for name, offset in shard.offsets.items():
            tensor = load(base / shard.file)[name]
            assert data[offset : offset + len(tensor.data)] == tensor.data
    assert sum(len(shard.offsets) for shard in plan.shards) == len(base_tensors())


def test_an_index_keeps_what_it_says_while_the_files_stay_and_drops_it_when_they_do_not(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    index = json.loads((base / INDEX).read_text())
    index["metadata"] |= {"total_parameters": 3888, "note": "kept", "total_size": 1}
    write_json(base / INDEX, index)
    kept = index_of(api.plan(base, adapter))
    assert kept["metadata"] == {"total_parameters": 3888, "note": "kept", "total_size": 7776}
    assert kept["weight_map"] == index["weight_map"]
    again = index_of(api.plan(base, adapter, max_shard_size="3kB"))
    assert again["metadata"] == {"note": "kept", "total_size": 7776}


def test_the_total_follows_the_dtype(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    assert index_of(api.plan(base, adapter, dtype="float32"))["metadata"]["total_size"] == 2 * 7776


def test_new_tensors_go_to_the_last_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    heads = {f"{PREFIX}score.weight": normal("score", 2, HIDDEN)}
    plan = api.plan(base, make_adapter(tmp_path / "adapter", all_factors() | heads, task_type="SEQ_CLS"))
    assert list(plan.shards[-1].offsets)[-1] == "score.weight"
    assert "score.weight" not in plan.shards[0].offsets
    assert plan.shards[0].header == (base / FIRST).read_bytes()[: len(plan.shards[0].header)]


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    plan = api.plan(base, adapter, max_shard_size="1")
    assert [len(shard.offsets) for shard in plan.shards] == [1] * len(base_tensors())
    assert plan.shards[0].file == shard_name(0, len(base_tensors()))


def test_files_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / SECOND).rename(base / "Model-00001-of-00002.safetensors")
    index = json.loads((base / INDEX).read_text())
    renamed = {SECOND: "Model-00001-of-00002.safetensors", FIRST: FIRST}
    write_json(base / INDEX, {**index, "weight_map": {k: renamed[v] for k, v in index["weight_map"].items()}})
    with pytest.raises(CompositionError, match="differ only in the case of their names"):
        api.plan(base, adapter)
