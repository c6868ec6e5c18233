"""GLoRA: weight and bias scaled, shifted and mixed (Chavan et al. 2023, arXiv:2306.07967; PEFT `tuners/glora`, 0.21).

`W' = W + W * A + B` and `b' = b + b * D + E + W @ C`. A and B are products of two factors, one value for each output,
or one value; C is a column for the inputs, or a product that makes one; D and E have one value for each output, or one.
A path that was switched off is saved as zeros. W is the base's in both: the new bias does not see the new weight. A
layer without a bias has C, D and E as zeros, which do nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from streammerge.core.lines import Lines
from streammerge.core.tensors import FactorView, Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, Slots, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Cut, Sizes

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2**20
"""Elements of W that are read at a time for a bias."""
RANGE = tuple[int, int]


class ScaledAndShifted(AbsoluteFormula):
    """Factors: for each X of `A` and `B` either `X` (R or 1, C or 1), or `X_left` (R, K) and `X_right` (K, C)."""

    title = "W + W * A + B"

    def locality(self, operation: Operation) -> Locality:
        """Element by element."""
        return Locality.ELEMENT

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Any part will do."""
        factors = {}
        for name, view in operation.factors.items():
            rows = view if name.endswith("_right") else _lines(view, 0, cut.rows)
            part = rows if name.endswith("_left") else _lines(rows, 1, cut.cols)
            turned = {"_left": "_right", "_right": "_left"}.get(name[1:], "") if cut.swapped else name[1:]
            factors[name[0] + turned] = part.t if cut.swapped else part
        return cut.turned(operation.place.transposed), factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The factors of a tile as they are read and as they are kept, and both matrices with a temporary."""
        rows, cols = tile
        ranks = [view.shape[1] for name, view in operation.factors.items() if name.endswith("_left")]
        return FLOAT64 * (2 * sum(ranks) * (rows + cols) + 5 * rows * cols)

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """`W * (1 + A) + B`."""
        scale, shift = (self._matrix(name, operation, region, factors) for name in "AB")
        return weight * (scale + 1.0) + shift

    def _matrix(self, name: str, operation: Operation, region: Region, factors: Factors) -> Tensor:
        """(T or 1, C or 1)."""
        views = operation.factors
        if name in views:
            rows, cols = _range(views[name], 0, region.rows), _range(views[name], 1, region.cols)
            return factors.part(views[name], rows, cols)
        left, right = views[f"{name}_left"], views[f"{name}_right"]
        rank = 0, left.shape[1]
        made: Tensor = factors.part(left, region.rows, rank) @ factors.kept(right, rank, region.cols)
        return made


class MixedBias(AbsoluteFormula):
    """Factors: `W` (R, I) of the base, `C` (I, 1) or `C_left` (I, K) and `C_right` (K, 1), `D` and `E` (R or 1, 1)."""

    title = "b + b * D + E + W @ C"

    def locality(self, operation: Operation) -> Locality:
        """Element by element, of the bias."""
        return Locality.ELEMENT

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """The rows that are there."""
        if cut.swapped or (cut.rows.total < cut.shape[0] and operation.factors["W"].axes[0].count > 1):
            raise refuse_part(operation, "weight and bias that are stored alike")
        whole = {name: view for name, view in operation.factors.items() if name[0] == "C"}
        rows = {name: _lines(view, 0, cut.rows) for name, view in operation.factors.items() if name not in whole}
        return cut.place, whole | rows

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Rows of W as they are read and as they are used, C, and a few vectors."""
        inputs = operation.factors["W"].shape[1]
        of_c = sum(view.count for name, view in operation.factors.items() if name[0] == "C")
        return FLOAT64 * (2 * max(AT_ONCE, inputs) + 2 * of_c + inputs + 6 * tile[0])

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """The new values (T, 1)."""
        import torch

        views = operation.factors
        if "C" in views:
            column = factors.vector(views["C"])
        else:
            column = factors.vector(views["C_left"]) @ factors.vector(views["C_right"])
        inputs, (first, last) = len(column), region.rows
        height = max(1, AT_ONCE // inputs)
        ranges = ((row, min(row + height, last)) for row in range(first, last, height))
        mixed = torch.cat([factors.part(views["W"], rows, (0, inputs)) @ column for rows in ranges])
        scale, shift = (factors.part(views[name], _range(views[name], 0, region.rows), (0, 1)) for name in "DE")
        return weight * (scale + 1.0) + shift + mixed


def _lines(view: FactorView, axis: int, lines: Lines) -> FactorView:
    """Some lines of an axis; all of one that has one value for all."""
    return view if view.shape[axis] == 1 else view.cut(axis, lines)


def _range(view: FactorView, axis: int, wanted: RANGE) -> RANGE:
    return (0, 1) if view.shape[axis] == 1 else wanted


def _slot_sets() -> Iterator[Slots]:
    """A and B are of one kind, and so are D and E."""
    of_c = ("Xd Xu", "X", "zeros")
    for weights, column, biases in product(of_c, of_c, ("X", "zeros")):
        parts = {"A": weights, "B": weights, "C": column, "D": biases, "E": biases}
        yield slots(" ".join(f"glora_{name}.{part}" for name, kind in parts.items() for part in kind.split()))


class Glora(Method):
    """Factors: of each X in A to E `glora_X.Xd` and `glora_X.Xu`, whose product it is, or `glora_X.X`, or
    `glora_X.zeros`: A and B (out, in), (out, 1) or (1), C (in, 1), D and E (out) or (1)."""

    title = "GLoRA"
    paper = "arXiv:2306.07967"
    only = "glora"
    # Which kinds of paths there are, the file's tensors say.
    known = Known(no_consequence=frozenset({"r", "config_A_B", "config_C", "config_D_E", "init_weights"}))
    modules = tuple(_slot_sets())
    formulas = MappingProxyType({"glora": ScaledAndShifted(), "glora_bias": MixedBias()})
    layers = "Linear"
    local = "the same elements; of the bias, whole rows of the weight"
    refuses = "biases of a weight that is stored in several parts"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), as far as A and C tell them."""
        slots = module.slots
        if "glora_A.zeros" in slots:
            return slots["glora_A.zeros"].shape
        column = next(slots[f"glora_C.{kind}"] for kind in ("Xd", "X", "zeros") if f"glora_C.{kind}" in slots)
        left = slots["glora_A.Xd" if "glora_A.Xd" in slots else "glora_A.X"]
        return left.shape[0] if len(left.shape) > 1 else None, column.shape[0]

    def idle(self, module: Module) -> Mapping[str, str]:
        """The paths to a bias that is not there."""
        if module.bias(module.sizes[0]):
            return {}
        return {f"glora_{name}.zeros": "zeros for a bias that the base does not have" for name in "CDE"}

    def effects(self, module: Module) -> Iterator[Effect]:
        """The weight, and the bias where there is one."""
        out, into = module.sizes
        weight = {**self._path(module, "A", (out, into)), **self._path(module, "B", (out, into))}
        yield module.change("glora", weight)
        bias = module.bias(out)
        if not bias:
            if not all(module.has(f"glora_{name}.zeros") for name in "CDE"):
                raise module.mismatch("it was trained with a bias, which the base does not have")
            return
        factors = {"W": module.stored_weight(), **self._path(module, "C", (into, 1))}
        for name in "DE":
            factors |= self._path(module, name, (out, 1))
        yield module.change("glora_bias", factors, on=bias)

    def _path(self, module: Module, name: str, shape: tuple[int, int]) -> dict[str, FactorView]:
        """The factors of a path of that shape."""
        slot = f"glora_{name}"
        if module.has(f"{slot}.Xd"):
            left, right = module.matrix(f"{slot}.Xd"), module.matrix(f"{slot}.Xu")
            if (left.shape[0], right.shape[1]) != shape or left.shape[1] != right.shape[0]:
                raise module.mismatch(f"`{slot}` is a product of {list(left.shape)} and {list(right.shape)}")
            return {f"{name}_left": left, f"{name}_right": right}
        view = module.matrix(f"{slot}.X" if module.has(f"{slot}.X") else f"{slot}.zeros")
        if view.shape not in (shape, (shape[0], 1), (1, 1)) or (name == "C" and view.shape != shape):
            raise module.mismatch(f"`{slot}` has shape {list(view.shape)}")
        return {name: view}
