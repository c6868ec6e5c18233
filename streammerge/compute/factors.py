"""Factors of adapters as tensors of the arithmetic's dtype, read when a tile needs them and let go afterwards.

One reader for each worker: what it keeps is its own, so that no lock stands in the arithmetic's way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from streammerge.compute.lanes import Workspace
from streammerge.core.dtypes import INTEGERS, itemsize, stored_dtype
from streammerge.core.tensors import FactorView, TensorInfo
from streammerge.sources.files import TensorFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Part = tuple[tuple[int, int], ...]
"""A range of each axis of a factor."""
SPREAD = 4
"""Where nothing is mapped, elements that are spread over more than so many times their number are read line by line: a
few rows of a transposed factor reach from one end of it to the other."""
MAPPED = 4 * 2**20
"""Bytes that are read through the mapping of an adapter before its pages are given back."""


class Facts(Protocol):
    """What is known of a source."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors by name."""


class Source(Protocol):
    """Where factors are read: an adapter, or the base."""

    @property
    def files(self) -> TensorFiles:
        """Reads its tensors."""

    @property
    def facts(self) -> Facts:
        """Which they are."""


class Drawn:
    """What formulas make of nothing but a key, such as the random projections of a seed: the last one, for all workers.
    Matrices of one adapter share one; to keep several would be memory that no plan has counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Hashable = None
        self._tensors: tuple[Tensor, ...] = ()

    def get(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What was made for the key, made now unless it was the last."""
        with self._lock:
            if key != self._key:
                self._key, self._tensors = None, ()
                self._tensors = make()
                self._key = key
            return self._tensors


class FactorReader:
    """Implements `methods.base.Factors` for one worker; `drawn` is what it shares with the others. `adapters` may have
    the base behind them, at `core.tensors.BASE`."""

    def __init__(self, adapters: Sequence[Source], work: Workspace | None = None, drawn: Drawn | None = None) -> None:
        self._adapters = adapters
        self._drawn = drawn or Drawn()
        self._work = work or Workspace.of_float64()
        self._kept: dict[FactorView, tuple[Part, float, Tensor]] = {}
        self._grams: dict[FactorView, tuple[Tensor, Tensor]] = {}
        self._made: dict[tuple[object, ...], Tensor] = {}
        self._touched: set[tuple[int, str]] = set()
        self._mapped = 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        return self._work.dtype

    def forget(self) -> None:
        """Let go of everything kept; called when a worker turns to another matrix."""
        self._kept.clear()
        self._grams.clear()
        self._made.clear()
        self._give_back()

    def part(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Rows and columns of a matrix factor."""
        return self._read(view, (rows, cols))

    def kept(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int], times: float = 1.0) -> Tensor:
        """All that is asked for, `times` a number, remembered until something else of the factor is asked for, or
        `forget`: a very long row is worked on in stretches, and all of them together are what the budget has no room
        for."""
        return self._remembered(view, (rows, cols), times)

    def gram(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int], times: float = 1.0) -> Tensor:
        """`kept` times its own transpose, as long as that stays the same."""
        of = self.kept(view, rows, cols, times)
        if view not in self._grams or self._grams[view][0] is not of:
            self._grams[view] = of, of @ of.T
        return self._grams[view][1]

    def vector(self, view: FactorView) -> Tensor:
        """All of a vector factor, remembered until `forget`."""
        return self._remembered(view, tuple((0, n) for n in view.shape), 1.0)

    def made(self, name: str, views: Sequence[FactorView], make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of these factors, remembered until `forget`."""
        key = name, *views
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def drawn(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` makes of nothing but its key, kept until another key is asked for."""
        return self._drawn.get(key, make)

    def _remembered(self, view: FactorView, part: Part, times: float) -> Tensor:
        if view not in self._kept or self._kept[view][:2] != (part, times):
            values = self._read(view, part)
            self._kept[view] = part, times, values if times == 1.0 else values.mul_(times)
        return self._kept[view][2]

    def _read(self, view: FactorView, ranges: Sequence[tuple[int, int]]) -> Tensor:
        import torch

        mapped = self._adapters[view.adapter].files.mapped
        dtype = torch.float64 if view.dtype in INTEGERS else self._work.dtype  # float32 ends at 2^24
        values = torch.empty([last - first for first, last in ranges], dtype=dtype)
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
        return values.to(self._work.device)

    def _copy(self, target: Tensor, view: FactorView, low: int, strides: tuple[int, ...]) -> None:
        """Fill `target` with the elements from `low` on."""
        import torch

        adapter = self._adapters[view.adapter]
        width = itemsize(view.dtype)
        high = low + sum((n - 1) * step for n, step in zip(target.shape, strides, strict=True)) + 1
        data = adapter.files.read(adapter.facts.tensors[view.key], low * width, high * width)
        target.copy_(torch.frombuffer(data, dtype=stored_dtype(view.dtype)).as_strided(target.shape, strides))

    def _give_back(self) -> None:
        """Let go of the pages that were read: the values are copies."""
        for number, key in self._touched:
            adapter = self._adapters[number]
            info = adapter.facts.tensors[key]
            adapter.files.give_back(info, 0, info.nbytes)
        self._touched.clear()
        self._mapped = 0
