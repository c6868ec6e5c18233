"""IA3: outputs, or in feed-forward layers inputs, times a learned vector (Liu et al. 2022, arXiv:2205.05638).

`W' = W * l` along one axis, and `bias' = bias * l` where outputs are scaled (PEFT `tuners/ia3/layer.py`, 0.13 to
0.21.2). Which of the two a module is, `feedforward_modules` says; the vector's length says which axis that is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region
from streammerge.methods.blockwise import positions
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Cut, Sizes

if TYPE_CHECKING:
    from torch import Tensor


class Scaled(AbsoluteFormula):
    """Factors: `outs` (O), or `ins` (groups * channels); numbers, with `ins`: `kernel`, the elements of a kernel, and
    `rows`, the outputs of a group, `channels` of which lie in a row."""

    title = "W * l"
    windowed = True
    commutes = True

    def locality(self, operation: Operation) -> Locality:
        """Element by element."""
        return Locality.ELEMENT

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Any part will do: the window says which it is."""
        return cut.turned(operation.place.transposed), operation.factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The vector, and what it is for each element of a tile."""
        return FLOAT64 * (2 * sum(view.count for view in operation.factors.values()) + 2 * tile[0] * tile[1])

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """`W * l`."""
        rows = positions(operation, region.rows, rows=True).to(weight.device)
        cols = positions(operation, region.cols, rows=False).to(weight.device)
        outs, ins = (cols, rows) if operation.place.transposed else (rows, cols)
        scale = self._scale(operation, outs, ins, factors)
        return weight * (scale.T if operation.place.transposed else scale)

    def _scale(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """(O, I), or (O, 1)."""
        if "outs" in operation.factors:
            return factors.vector(operation.factors["outs"])[outs][:, None]
        numbers = {name: int(number) for name, number in operation.numbers.items()}
        channel = outs[:, None] // numbers["rows"] * numbers["channels"] + ins[None, :] // numbers["kernel"]
        return factors.vector(operation.factors["ins"])[channel]


class Ia3(Method):
    """Factors: `ia3_l` (out, 1), or (1, in) in feed-forward layers, for convolutions (1, n, 1, ...)."""

    title = "IA3"
    paper = "arXiv:2205.05638"
    only = "ia3"
    known = Known(read=frozenset({"feedforward_modules"}), no_consequence=frozenset({"init_ia3_weights"}))
    modules = (slots("ia3_l"),)
    formulas = MappingProxyType({"ia3": Scaled()})
    layers = "Linear, Conv1D, Conv2d, Conv3d"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> Sizes | None:
        """(out, in), of which a linear layer's vector tells one: it stands upright for outputs and lies for inputs."""
        match module.slots["ia3_l"].shape:
            case (size, 1):
                return size, None
            case (1, size):
                return None, size
        return None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The weight, and the bias with it where outputs are scaled."""
        vector = module.vector("ia3_l")
        size = vector.shape[0]
        if _feeds_forward(module):
            yield self._inputs(module, size)
            return
        transposed = module.transposed(out=size)
        yield module.change("ia3", {"outs": vector}, transposed=transposed)
        bias = module.bias(size)
        if bias:
            yield module.change("ia3", {"outs": vector}, on=bias)

    def _inputs(self, module: Module, size: int) -> Effect:
        shape, vector = module.target.shape, module.vector("ia3_l")
        if len(shape) == 2:
            transposed, channels, groups = module.transposed(into=size), size, 1
        else:  # a kernel of a grouped convolution holds the channels of one group
            transposed, channels = False, shape[1]
            groups, rest = divmod(size, channels)
            if rest or shape[0] % max(groups, 1):
                raise module.mismatch(f"its vector is for {size:,} inputs")
        outputs = shape[1] if transposed else shape[0]
        numbers = {"kernel": math.prod(shape[2:]), "rows": outputs // groups, "channels": channels}
        return module.change("ia3", {"ins": vector}, numbers, transposed=transposed)


def _feeds_forward(module: Module) -> bool:
    """Whether PEFT scales the module's inputs: a pattern for its whole path, or names that this ends with."""
    named = module.config.get("feedforward_modules") or ()
    if isinstance(named, str):
        return re.fullmatch(named, module.name) is not None
    return any(module.name.endswith(name) for name in named)
