"""What befalls an adapter's files between PEFT and us: other fields in the config, other keys, another format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], None]
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."


def read_config(adapter: Path) -> dict[str, Any]:
    """The adapter's config."""
    return json.loads((adapter / CONFIG).read_text())


def set_config(**fields: Any) -> Edit:
    """Fields of adapter_config.json set; those given as None are taken out."""

    def edit(adapter: Path) -> None:
        config = read_config(adapter) | fields
        kept = {name: value for name, value in config.items() if not (name in fields and value is None)}
        (adapter / CONFIG).write_text(json.dumps(kept))

    return edit


def rename_keys(new_name: Callable[[str], str]) -> Edit:
    """Every tensor under another key."""

    def edit(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        renamed = {new_name(name): tensor for name, tensor in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, adapter / WEIGHTS, {"format": "pt"})

    return edit


def as_pickle(adapter: Path) -> None:
    """The weights as PEFT saved them before 0.7, and still does with `safe_serialization=False`."""
    torch.save(load_file(adapter / WEIGHTS), adapter / PICKLE)
    (adapter / WEIGHTS).unlink()
