"""Whatever the base, the adapters and the options: every byte of the result is what the formula gives."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import load_file

import streammerge
from tests.properties import drawing
from tests.properties.drawing import Adapted, Merge, differing, merges
from tests.refusals.making import tree_digest

if TYPE_CHECKING:
    import pytest
    import torch

LONG = os.environ.get("STREAMMERGE_LONG") == "1"
PAIRS = 2000 if LONG else 40
"""Random bases with random adapters."""
COUNTED = {"merges": 0}


def outcome(merge: Merge, root: Path) -> dict[str, torch.Tensor]:
    """The tensors of the merge that streammerge writes, from a directory that is whole and verified."""
    shutil.rmtree(root, ignore_errors=True)
    base, adapters = merge.write(root)
    before = [tree_digest(path) for path in (base, *adapters)]
    out = root / "out"
    weights = [adapter.weight for adapter in merge.adapters]
    streammerge.merge(base, adapters, out, weights=weights, verify=False, **merge.options)
    assert [tree_digest(path) for path in (base, *adapters)] == before
    files = sorted(path.name for path in out.glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    if len(files) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file in files for name in load_file(out / file)}
        assert index["metadata"]["total_size"] == sum(len(drawing.bytes_of(tensor)) for tensor in found.values())
    if merge.options["max_shard_size"] == "keep":
        assert files == sorted(merge.files)
        assert {file: sorted(load_file(out / file)) for file in files} == {
            file: sorted(names) for file, names in merge.files.items()
        }
    return found


def checked(root: Path, examples: int, seed: int = 0) -> Callable[[], None]:
    """The property over so many merges, as a function without arguments."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(merge=merges())
    def every_byte(merge: Merge) -> None:
        COUNTED["merges"] += 1
        assert differing(outcome(merge, root / "case"), merge.expected()) == []

    return every_byte


def test_every_byte_of_a_random_merge_is_what_the_formula_gives(tmp_path: Path) -> None:
    before = COUNTED["merges"]
    checked(tmp_path, PAIRS)()
    assert COUNTED["merges"] >= before + PAIRS


def test_an_oracle_of_another_scaling_disagrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case: dict[str, list[str]] = {}

    def look(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
        case["differing"] = list(drawing.differing(found, wanted))
        return []

    real = Adapted.scaling
    monkeypatch.setattr(Adapted, "scaling", lambda self, module: real(self, module) * 1.5)
    monkeypatch.setattr(sys.modules[__name__], "differing", look)
    checked(tmp_path, 1)()
    assert case["differing"]
