"""Factors of adapters as float64 tensors, read when a tile needs them and let go afterwards.

One reader for each worker: what it keeps is its own, so that no lock stands in the arithmetic's way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.core.dtypes import itemsize, torch_dtype
from streammerge.core.tensors import FactorView
from streammerge.sources.adapter import Adapter

if TYPE_CHECKING:
    from torch import Tensor

Part = tuple[tuple[int, int], ...]
"""Rows and columns of a matrix factor; nothing for all of a vector."""
SPREAD = 4
"""Where nothing is mapped, elements that are spread over more than so many times their number are read line by line: a
few rows of a transposed factor reach from one end of it to the other."""
MAPPED = 4 * 2**20
"""Bytes that are read through the mapping of an adapter before its pages are given back."""


class FactorReader:
    """Implements `methods.base.Factors` for one worker."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self._adapters = adapters
        self._kept: dict[FactorView, tuple[Part, Tensor]] = {}
        self._touched: set[tuple[int, str]] = set()
        self._mapped = 0

    def forget(self) -> None:
        """Let go of everything kept; called when a worker turns to another matrix."""
        self._kept.clear()
        self._give_back()

    def part(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Rows and columns of a matrix factor, float64."""
        return self._read(view, (rows, cols))

    def kept(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """The same, remembered until another part of the factor is asked for, or `forget`: a very long row is worked
        on in stretches, and all of them together are what the budget has no room for."""
        return self._remembered(view, (rows, cols), lambda: self.part(view, rows, cols))

    def vector(self, view: FactorView) -> Tensor:
        """All of a vector factor, float64, remembered until `forget`."""
        return self._remembered(view, (), lambda: self._read(view, [(0, n) for n in view.shape]))

    def _remembered(self, view: FactorView, part: Part, read: Callable[[], Tensor]) -> Tensor:
        if view not in self._kept or self._kept[view][0] != part:
            self._kept[view] = part, read()
        return self._kept[view][1]

    def _read(self, view: FactorView, ranges: Sequence[tuple[int, int]]) -> Tensor:
        import torch

        mapped = self._adapters[view.adapter].files.mapped
        values = torch.empty([last - first for first, last in ranges], dtype=torch.float64)
        for block in view.blocks(ranges):
            target = values[block.where]
            if mapped or block.high - block.low <= SPREAD * target.numel():
                self._copy(target, view, block.low, block.strides)
                continue
            axis = block.strides.index(max(block.strides))
            for number, line in enumerate(target.unbind(axis)):
                at = block.low + number * block.strides[axis]
                self._copy(line, view, at, block.strides[:axis] + block.strides[axis + 1 :])
        self._touched.add((view.adapter, view.key))
        self._mapped += values.numel() * itemsize(view.dtype)
        if self._mapped > MAPPED:
            self._give_back()
        return values

    def _copy(self, target: Tensor, view: FactorView, low: int, strides: tuple[int, ...]) -> None:
        """Fill `target` with the elements from `low` on."""
        import torch

        adapter = self._adapters[view.adapter]
        width = itemsize(view.dtype)
        high = low + sum((n - 1) * step for n, step in zip(target.shape, strides, strict=True)) + 1
        data = adapter.files.read(adapter.facts.tensors[view.key], low * width, high * width)
        target.copy_(torch.frombuffer(data, dtype=torch_dtype(view.dtype)).as_strided(target.shape, strides))

    def _give_back(self) -> None:
        """Let go of the pages that were read: the values are copies."""
        for number, key in self._touched:
            adapter = self._adapters[number]
            info = adapter.facts.tensors[key]
            adapter.files.give_back(info, 0, info.nbytes)
        self._touched.clear()
        self._mapped = 0
