"""What the formulas of OFT, RoAd, SHiRA, Super-tuning and others take for granted: weights, indices, memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.core.errors import AdapterError, BudgetError, CompositionError, NotMergeableError
from streammerge.methods.cayley import neumann
from streammerge.methods.types import oft
from streammerge.names.pieces import suits
from tests.factories import load_tensors
from tests.methods.test_turning import adapter, slot
from tests.oracle.editing import PREFIX, WEIGHTS, Edit

BEYOND: Mapping[str, tuple[str, Edit]] = {
    "a column": ("shira", slot("shira_indices", lambda t: t + torch.tensor([[0], [1]]))),
    "a row": ("shira", slot("shira_indices", lambda t: t + torch.tensor([[1], [0]]))),
    "a negative one": ("shira", slot("shira_indices", lambda t: t - torch.tensor([[0], [1]]))),
    "half a one": ("shira", slot("shira_indices", lambda t: t / 2)),
    "a flat one": ("super", slot("supertuning_indices", lambda t: t + 24 * 16)),
}


@pytest.mark.parametrize("name", BEYOND)
def test_an_index_beyond_the_weight_is_refused(name: str, tmp_path: Path) -> None:
    kind, edit = BEYOND[name]
    given = adapter(kind, tmp_path)
    edit(given)
    with pytest.raises(NotMergeableError, match="`wide`: its indices reach beyond a weight of 24 x 16"):
        streammerge.merge(tmp_path / "base", given, tmp_path / "out")


def test_indices_that_windows_saved_as_floats_are_read(tmp_path: Path) -> None:
    given = adapter("shira", tmp_path)
    streammerge.merge(tmp_path / "base", given, tmp_path / "out")
    slot("shira_indices", torch.Tensor.float)(given)
    streammerge.merge(tmp_path / "base", given, tmp_path / "again")
    first, second = (load_tensors(tmp_path / name) for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_float32_arithmetic_reads_large_indices_exactly(tmp_path: Path) -> None:
    weight = torch.zeros(4099, 4100)
    at = torch.tensor([4098 * 4100 + 4099, 4098 * 4100 + 4097, 7], dtype=torch.int32)
    base, given = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    given.mkdir()
    save_file({"big.weight": weight}, base / "model.safetensors", {"format": "pt"})
    factors = {"supertuning_values": torch.tensor([1.0, 2.0, 3.0]), "supertuning_indices": at}
    save_file({f"{PREFIX}big.{name}": tensor for name, tensor in factors.items()}, given / WEIGHTS, {"format": "pt"})
    (given / "adapter_config.json").write_text('{"peft_type": "SUPERTUNING", "sparsity": 0.9999998}')
    streammerge.merge(base, given, tmp_path / "out", accumulate="float32")
    weight.view(-1)[at.long()] = factors["supertuning_values"]
    assert torch.equal(load_tensors(tmp_path / "out")["big.weight"], weight)


@pytest.mark.parametrize("name", ["oft", "road", "bat", "norms", "tokens"])
def test_what_is_no_sum_has_no_weight(name: str, tmp_path: Path) -> None:
    given = adapter(name, tmp_path)
    with pytest.raises(CompositionError, match="no weighted form"):
        streammerge.plan(tmp_path / "base", given, weights=[0.5])


@pytest.mark.parametrize("name", ["miss", "beft", "shira", "super", "c3a", "gralora"])
def test_what_is_a_sum_has_a_weight(name: str, tmp_path: Path) -> None:
    given = adapter(name, tmp_path)
    before = load_tensors(tmp_path / "base")
    halves, wholes = tmp_path / "halves", tmp_path / "wholes"
    streammerge.merge(tmp_path / "base", given, halves, weights=[0.5])
    streammerge.merge(tmp_path / "base", given, wholes)
    half, whole = load_tensors(halves), load_tensors(wholes)
    changed = [key for key in before if not torch.equal(before[key], whole[key])]
    assert changed
    for key in changed:
        assert torch.allclose(2 * (half[key] - before[key]), whole[key] - before[key], atol=1e-6)


def test_an_adapter_of_zeros_changes_nothing_and_says_so(tmp_path: Path) -> None:
    given = adapter("c3a", tmp_path)
    slot("c3a_kernel", torch.zeros_like)(given)
    with pytest.raises(AdapterError, match="zero"):
        streammerge.plan(tmp_path / "base", given)


def test_elements_that_must_be_found_need_the_matrix_in_memory(tmp_path: Path) -> None:
    weight = torch.randn(3000, 2000)
    base, given = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    given.mkdir()
    save_file({"big.weight": weight}, base / "model.safetensors", {"format": "pt"})
    count = int(weight.numel() * (1 - 0.99))
    save_file({f"{PREFIX}big.supertuning_values": torch.ones(count)}, given / WEIGHTS, {"format": "pt"})
    (given / "adapter_config.json").write_text('{"peft_type": "SUPERTUNING", "sparsity": 0.99}')
    with pytest.raises(BudgetError, match=r"needs all of it in memory"):
        streammerge.plan(base, given, memory="100MB")
    streammerge.plan(base, given, memory="500MB")


def test_rotations_are_made_once_for_all_tiles_of_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, given = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    given.mkdir()
    save_file({"tall.weight": torch.randn(6000, 64)}, base / "model.safetensors", {"format": "pt"})
    save_file({f"{PREFIX}tall.oft_R.weight": torch.randn(8, 28)}, given / WEIGHTS, {"format": "pt"})
    (given / "adapter_config.json").write_text('{"peft_type": "OFT", "peft_version": "0.21.2"}')
    made: list[int] = []

    def counted(skew: torch.Tensor, powers: int, last: float) -> torch.Tensor:
        made.append(powers)
        return neumann(skew, powers, last)

    monkeypatch.setattr(oft, "neumann", counted)
    streammerge.merge(base, given, tmp_path / "out", workers=1, verify=False)
    assert made == [4]


def test_a_shape_may_be_known_in_part() -> None:
    assert suits((3, 4), (None, 4))
    assert suits((3, 4), (None, None))
    assert not suits((3, 4), (4, None))
    assert not suits((3, 4), (None,))


def test_values_at_one_position_are_added(tmp_path: Path) -> None:
    given = adapter("shira", tmp_path)
    slot("shira_indices", torch.zeros_like)(given)
    streammerge.merge(tmp_path / "base", given, tmp_path / "out")
    before, after = (load_tensors(tmp_path / name)["wide.weight"] for name in ("base", "out"))
    total = load_file(given / WEIGHTS)[f"{PREFIX}wide.shira_weight"].sum()
    assert torch.allclose(after[0, 0], before[0, 0] + total)
    assert torch.equal(after.view(-1)[1:], before.view(-1)[1:])
