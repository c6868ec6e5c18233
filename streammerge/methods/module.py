"""One adapted module as a method sees it: its factors, its config, and the parameter of the base that they change.

A method asks a module for factors by slot and for numbers by field, and says what happens to the parameter; which way
round the weight is stored is found here, from the sizes that the factors have. The invariant: nothing here looks at a
value, and what does not fit is refused with both shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.core.errors import AdapterError, IncompleteFactorsError, NotMergeableError, ShapeMismatchError
from streammerge.core.lines import Lines, all_lines
from streammerge.core.tensors import BASE, FactorView, MatrixView, Operation, Place, TensorInfo
from streammerge.methods import fields
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.reading import AdapterInput, BaseView
from streammerge.names.pieces import Parameter

Effect = tuple[Parameter, Operation]
"""A parameter, and what happens to its matrix in the model's own orientation."""


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted module. `target` is the parameter that its factors are about, found by `rule`; `shared` are the
    adapter's tensors that belong to no module, `siblings` all modules of the adapter that are in the base, this one
    among them."""

    factors: ModuleFactors
    target: Parameter
    rule: str
    adapter: AdapterInput
    base: BaseView
    common: fields.Common
    shared: Mapping[str, TensorInfo]
    siblings: tuple[tuple[ModuleFactors, Parameter], ...] = ()

    @property
    def name(self) -> str:
        """Its path in the model that was trained."""
        return self.factors.module

    @property
    def config(self) -> Mapping[str, Any]:
        """The raw fields of the config, to be read with `fields`."""
        return self.adapter.config

    @property
    def sizes(self) -> tuple[int, int]:
        """Rows and columns of the parameter as a matrix: a kernel is (out, in x kernel), a vector (n, 1)."""
        view = MatrixView.of(self.target.shape)
        return view.rows, view.cols

    # --- factors ----------------------------------------------------------------------------------------------------
    def has(self, slot: str) -> bool:
        """Whether the module has such a tensor."""
        return slot in self.factors.slots

    def info(self, slot: str) -> TensorInfo:
        """The tensor of a slot, the module's own or a shared one. Raises IncompleteFactorsError."""
        found = self.factors.slots.get(slot) or self.shared.get(slot)
        if found is None:
            raise IncompleteFactorsError(self.keys, f"the adapter has no `{slot}` for module `{self.name}`")
        return found

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the module's own tensors in the file."""
        return tuple(info.name for info in self.factors.slots.values())

    def vector(self, slot: str) -> FactorView:
        """All of a tensor, as a vector."""
        return FactorView.vector(self.adapter.number, self.info(slot))

    def matrix(self, slot: str, rows: int | None = None) -> FactorView:
        """All of a tensor as a matrix of so many rows, by default as many as its first axis has."""
        info = self.info(slot)
        rows = info.shape[0] if rows is None else rows
        if rows < 1 or info.count % rows:
            raise self.mismatch(f"`{slot}` has shape {list(info.shape)}, which is no {rows:,} rows")
        return FactorView.matrix(self.adapter.number, info, rows, info.count // rows)

    def stored_weight(self) -> FactorView:
        """The parameter as the base has it, a matrix in the model's own orientation, read beside what it changes.

        Raises NotMergeableError where it is stored in several parts.
        """
        rows, cols = self.sizes
        (cut, *others) = self.target.cuts(stacked=False)[0]
        if others or (cut.rows, cut.cols) != (all_lines(rows), all_lines(cols)):
            raise self.refused(f"`{self.target.name}` is stored in several parts, and all of it is needed at once")
        place = cut.place
        width, first = place.view.cols, place.matrix * place.view.rows * place.view.cols
        lines = place.rows
        steps = lines.step * width, lines.count, lines.pitch * width
        axes = Lines(first + lines.start * width, lines.size, *steps), place.cols
        view = FactorView(BASE, place.tensor, self.target.dtype, place.view.stack * place.view.rows * width, axes)
        return view.t if cut.swapped else view

    # --- orientation ------------------------------------------------------------------------------------------------
    def transposed(self, out: int | None = None, into: int | None = None) -> bool:
        """Whether the weight is stored (in, out), from the numbers of outputs and inputs that the factors tell; where
        both ways fit, the architecture decides, else `fan_in_fan_out`, which PEFT saves for the last module only.

        Raises ShapeMismatchError where neither fits.
        """
        rows, cols = self.sizes
        straight = out in (None, rows) and into in (None, cols)
        turned = out in (None, cols) and into in (None, rows) and len(self.target.shape) == 2
        if straight and turned:
            architecture = self.base.architecture
            last = self.name.rpartition(".")[2]
            return last in architecture.conv1d if architecture else self.common.fan_in_fan_out
        if not straight and not turned:
            sizes = (f"{count:,} {what}" for count, what in ((out, "outputs"), (into, "inputs")) if count is not None)
            raise self.mismatch(f"its factors are for {' and '.join(sizes)}")
        return turned

    def mismatch(self, reason: str) -> AdapterError:
        """The refusal of factors that do not fit the parameter."""
        stored = f"`{self.target.name}` in the base has shape {list(self.target.shape)}"
        advice = "is this the base the adapter was trained on?"
        return ShapeMismatchError(self.keys, f"`{self.name}`: {reason}; {stored}", advice)

    def refused(self, reason: str) -> AdapterError:
        """The refusal of something that is never merged."""
        return NotMergeableError(self.keys, f"`{self.name}`: {reason}")

    # --- effects ----------------------------------------------------------------------------------------------------
    def change(
        self,
        formula: str,
        factors: Mapping[str, FactorView],
        numbers: Mapping[str, float] | None = None,
        *,
        transposed: bool = False,
        on: Parameter | None = None,
    ) -> Effect:
        """What a formula does to all of the parameter, or of another one."""
        target = on or self.target
        view = MatrixView.of(target.shape)
        place = Place(target.name, view, 0, all_lines(view.rows), all_lines(view.cols), transposed)
        return target, Operation(formula, place, self.adapter.number, self.name, self.rule, factors, numbers or {})

    def product(
        self,
        formula: str,
        left: FactorView,
        right: FactorView,
        scaling: float,
        *,
        vectors: Mapping[str, FactorView] | None = None,
    ) -> Effect:
        """What a product `left` (out, K) @ `right` (K, in) does, `vectors` being diagonals `rows` (out), `middle` (K)
        and `cols` (in) around them, whichever way round the weight is stored."""
        transposed = self.transposed(left.shape[0], right.shape[1])
        factors = {"left": left, "right": right, **(vectors or {})}
        if transposed:
            turned = {"rows": "cols", "cols": "rows", "middle": "middle"}
            factors = {"left": right.t, "right": left.t} | {turned[n]: view for n, view in (vectors or {}).items()}
        return self.change(formula, factors, {"scaling": scaling}, transposed=transposed)

    def bias(self, size: int) -> Parameter | None:
        """The module's bias of so many values, None where the base has none. Raises ShapeMismatchError for another
        size."""
        name = self.target.name.removesuffix("weight") + "bias"
        found = self.base.find(name, (size,))
        if found is None:
            return None
        if found.target.shape != (size,):
            raise self.mismatch(f"`{name}` has shape {list(found.target.shape)}, the adapter's has {size:,} values")
        return found.target
