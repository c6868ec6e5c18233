"""How much of an adapter is read for a part of a factor, where nothing is mapped."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from streammerge.compute.factors import FactorReader
from streammerge.core import io
from streammerge.core.tensors import FactorView
from streammerge.sources.adapter import open_adapter

LONG, RANK = 4096, 8
NAME = "base_model.model.model.embed_tokens.lora_embedding_A"


@pytest.fixture
def adapter(tmp_path):
    values = np.arange(RANK * LONG, dtype=np.float32).reshape(RANK, LONG)
    save_file({NAME: values}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK}))
    return open_adapter(str(tmp_path), "pread")


@pytest.fixture
def sizes(adapter, monkeypatch):
    """The sizes of all reads from now on."""
    found = []
    read_into = io.read_into

    def counted(fd, path, offset, buffer):
        found.append(len(buffer))
        read_into(fd, path, offset, buffer)

    monkeypatch.setattr(io, "read_into", counted)
    return found


def test_rows_of_a_transposed_factor_cost_no_more_than_they_hold(adapter, sizes):
    view = FactorView.matrix(0, adapter.facts.tensors[NAME], RANK, LONG).t
    part = FactorReader([adapter]).part(view, (100, 116), (0, RANK))
    assert part.tolist() == [[float(row + col * LONG) for col in range(RANK)] for row in range(100, 116)]
    assert sizes == [16 * 4] * RANK


def test_a_strip_of_columns_costs_no_more_than_it_holds(adapter, sizes):
    view = FactorView.matrix(0, adapter.facts.tensors[NAME], RANK, LONG)
    part = FactorReader([adapter]).part(view, (0, RANK), (512, 1024))
    assert part.tolist() == [[float(row * LONG + col) for col in range(512, 1024)] for row in range(RANK)]
    assert sizes == [512 * 4] * RANK


def test_what_lies_together_is_read_at_once(adapter, sizes):
    view = FactorView.matrix(0, adapter.facts.tensors[NAME], RANK, LONG)
    assert FactorReader([adapter]).part(view, (2, 4), (0, LONG)).sum() == sum(range(2 * LONG, 4 * LONG))
    assert FactorReader([adapter]).part(view.t, (0, LONG), (2, 4)).sum() == sum(range(2 * LONG, 4 * LONG))
    assert sizes == [2 * LONG * 4] * 2
