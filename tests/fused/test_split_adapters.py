"""Adapters on the parts of what is stored fused: every row of the table of layouts, merged and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge
from tests.fused.adapters import Adapter, compare
from tests.fused.subjects import FusedModule, Subject, subjects

EMBEDDINGS = ("tok_embeddings", "wte", "word_embeddings")
SUBJECTS = [pytest.param(made, id=name) for name, made in subjects()]


def adapt(adapter: Adapter, module: FusedModule, part: int, expert: int = 0, spelling: int = 0) -> None:
    """Train one part: its factors go into the adapter, its delta onto the rows of the fused tensor that are the part."""
    rows, matrix = module.parts[part], module.matrices[expert]
    embedding = module.path.endswith(EMBEDDINGS)
    delta = adapter.add(module.name(part, expert, spelling), len(rows), matrix.shape[1], embedding=embedding)
    matrix[rows] = (matrix[rows].double() + delta).to(matrix.dtype)


def merge(subject: Subject, adapter: Adapter, base: Path, *, published: bool = True) -> tuple[int, streammerge.Report]:
    """Merge into `base`, compare with what the subject is by now; how many stored tensors changed."""
    root = base.parent
    wanted = subject.save(root / "wanted", published=published)
    report = streammerge.merge(base, adapter.save(root / "adapter"), root / "out", verify=False)
    return compare(root / "out", wanted, base), report


@pytest.mark.parametrize("made", SUBJECTS)
def test_parts_of_a_fused_module_reach_their_rows(made, tmp_path):
    subject, adapter = made(), Adapter()
    base = subject.save(tmp_path / "base", published="experts" not in subject.fused[0].row)
    for module in subject.fused:
        for expert in sorted({0, len(module.matrices) - 1}):
            for part in range(len(module.parts)):
                adapt(adapter, module, part, expert)
    changed, _ = merge(subject, adapter, base, published="experts" not in subject.fused[0].row)
    assert changed == len(subject.fused)


@pytest.mark.parametrize("made", SUBJECTS)
def test_one_part_leaves_the_others_bit_for_bit(made, tmp_path):
    subject, adapter = made(), Adapter()
    base = subject.save(tmp_path / "base")
    module = subject.fused[-1]
    adapt(adapter, module, len(module.parts) - 1, len(module.matrices) // 2, spelling=-1)
    changed, _ = merge(subject, adapter, base)
    assert changed == 1
