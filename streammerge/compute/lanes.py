"""Where tiles are worked on: one lane for each worker, with memory that is used again from tile to tile.

A lane takes stored bytes in and hands rounded bytes out; what lies between is torch, the same code on every device. It
may let several stretches of tiles be under way at once; the bytes of one are there when its receipt says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from streammerge.core.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Receipt = Callable[[], None]
"""Returns when the bytes that were handed out are where they were wanted."""


class Workspace:
    """Tensors of one dtype on one device, by name, in memory that is kept."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._kept: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}

    @classmethod
    def of_float64(cls) -> Workspace:
        """What the arithmetic is done in unless somebody says otherwise, on the processor."""
        import torch

        return cls(torch.float64, torch.device("cpu"))

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor of that shape with any content; the same memory whenever `name` is asked for."""
        import torch

        last = self._last.get(name)
        if last is not None and last.shape == shape:
            return last
        count = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.numel() < count:
            kept = self._kept[name] = torch.empty(count, dtype=self.dtype, device=self.device)
        self._last[name] = kept[:count].view(shape)
        return self._last[name]


class Lane(Protocol):
    """One worker's way through a device."""

    work: Workspace
    depth: int
    """How many stretches of tiles may be under way before the oldest is waited for."""

    def active(self) -> AbstractContextManager[object]:
        """Within `with`, torch works on this lane's device and queue."""

    def settle(self) -> None:
        """Return when everything asked for so far is done, and another lane may use it."""

    def borrow(self, state: Any) -> Any:
        """The tensors of `state`, which some lane made and settled, for use within this `active()`."""

    def upload(self, data: memoryview, dtype: str, shape: tuple[int, int]) -> Tensor:
        """Stored bytes as a tensor on the device; `data` may be let go of afterwards, unless `depth` is 0."""

    def target(self, dtype: str, shape: tuple[int, int], into: memoryview) -> Tensor:
        """A tensor on the device for what is to come into `into`."""

    def send(self, written: Tensor, into: memoryview) -> Receipt:
        """Begin to bring a target's values into `into`."""


class Device(Protocol):
    """A kind of place to work on."""

    name: str

    def lane(self, dtype: torch.dtype) -> Lane:
        """A lane whose arithmetic is done in `dtype`, for one thread."""


class CpuLane:
    """The processor: nothing is copied that need not be, and every tile is done when its turn is over."""

    depth = 0

    def __init__(self, dtype: torch.dtype) -> None:
        import torch

        self.work = Workspace(dtype, torch.device("cpu"))

    def active(self) -> AbstractContextManager[object]:
        """Nothing to switch to."""
        return nullcontext()

    def settle(self) -> None:
        """Everything is done when its call returns."""

    def borrow(self, state: Any) -> Any:
        """As they are."""
        return state

    def upload(self, data: memoryview, dtype: str, shape: tuple[int, int]) -> Tensor:
        """The bytes where they lie."""
        import torch

        return torch.frombuffer(data, dtype=torch_dtype(dtype)).view(shape)

    def target(self, dtype: str, shape: tuple[int, int], into: memoryview) -> Tensor:
        """The very memory they are wanted in."""
        import torch

        return torch.frombuffer(into, dtype=torch_dtype(dtype)).view(shape)

    def send(self, written: Tensor, into: memoryview) -> Receipt:
        """They are there."""
        return _nothing


def _nothing() -> None:
    """The receipt of what is there already."""


class Cpu:
    """The processor's cores."""

    name = "cpu"

    def lane(self, dtype: torch.dtype) -> Lane:
        """A lane on whichever core the thread runs."""
        return CpuLane(dtype)
