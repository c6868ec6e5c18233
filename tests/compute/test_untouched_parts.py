"""What no operation touches stays what it was to the last bit, inside a tensor and a tile that is touched elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import streammerge
from tests.refusals.making import Stored, load, save

HIDDEN, HEADS, RANK = 32, 4, 2
SHARE = HIDDEN
"""Rows of each of q, k and v."""
NAME = "model.layers.0.self_attn.qkv_proj"
ODD = np.array([0x8000, 0x7F81, 0xFFC1, 0xFF80, 0x0001], np.uint16)
"""Minus zero, NaN of two kinds, infinity and a denormal number, as bfloat16."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A fused projection, small enough for one tile, with odd values in the rows of k."""
    words = np.random.default_rng(0).integers(0x3C00, 0x3E00, (3 * SHARE, HIDDEN), dtype=np.uint16)
    words[SHARE : 2 * SHARE].reshape(-1)[: len(ODD)] = ODD
    root = tmp_path / "base"
    root.mkdir()
    stored = Stored("BF16", words.shape, words.tobytes())
    save(root / "model.safetensors", {f"{NAME}.weight": stored})
    config = {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_size": HIDDEN,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """LoRA on q and v."""
    generator = np.random.default_rng(1)
    module = "base_model.model.model.layers.0.self_attn"
    factors = {
        f"{module}.{part}.lora_{side}.weight": generator.standard_normal(shape).astype("f4")
        for part in ("q_proj", "v_proj")
        for side, shape in (("A", (RANK, HIDDEN)), ("B", (SHARE, RANK)))
    }
    root = tmp_path / "adapter"
    root.mkdir()
    save_file(factors, root / "adapter_model.safetensors")
    (root / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK}))
    return root


@pytest.mark.parametrize("accumulate", ["float64", "float32"])
def test_rows_between_touched_ones_keep_every_bit(tmp_path: Path, base: Path, adapter: Path, accumulate: str) -> None:
    streammerge.merge(base, adapter, tmp_path / "out", accumulate=accumulate)
    name = f"{NAME}.weight"
    before, after = (
        np.frombuffer(load(root / "model.safetensors")[name].data, np.uint16).reshape(3 * SHARE, HIDDEN)
        for root in (base, tmp_path / "out")
    )
    assert np.array_equal(after[SHARE : 2 * SHARE], before[SHARE : 2 * SHARE])
    assert (after[:SHARE] != before[:SHARE]).mean() > 0.5
    assert (after[2 * SHARE :] != before[2 * SHARE :]).mean() > 0.5
