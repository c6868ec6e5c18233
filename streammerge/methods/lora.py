"""Reading a LoRA adapter: from the factors of its modules to operations on places of the base.

Formulas, file forms and the shape eras of `target_parameters` were checked against PEFT 0.13 to 0.21.2. One function
for each kind of layer; which kind a module is follows from its factors and from the tensor it resolves to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from streammerge.core.errors import (
    AdapterError,
    CompositionError,
    ConfigContradictionError,
    NotMergeableError,
    ShapeMismatchError,
    UnmatchedKey,
)
from streammerge.core.tensors import FactorView, Operation, Place, TensorInfo
from streammerge.methods.experts import StackedFactors, parameter_of, seen_orientation
from streammerge.methods.full_tensors import read_full_tensors, resolve_full_tensors
from streammerge.methods.lora_config import LoraConfig, parse_config
from streammerge.methods.lora_slots import BIAS, DIAGONAL, MAGNITUDE, check_slots, without_training_state
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.placing import parameter_place, placed
from streammerge.methods.reading import AdapterInput, BaseView, Contribution
from streammerge.names.pieces import Parameter, Piece
from streammerge.names.resolve import Found, Missing, Wanted


def read_lora(adapter: AdapterInput, base: BaseView) -> Contribution:
    """The contribution of one LoRA adapter. Raises AdapterError subclasses for what can never be merged."""
    config = parse_config(adapter.config, adapter.ignored_fields)
    contribution = Contribution()
    modules = [without_training_state(module, adapter.config, contribution.ignored) for module in adapter.parts.modules]
    for module in modules:
        check_slots(module, config)
    wishes = [_wish(module, config, base) for module in modules]
    full = resolve_full_tensors(adapter.parts, config)
    answers = base.resolve([*wishes, *full])
    resized = _resized(adapter, answers[len(wishes) :])
    found: list[_Module] = []
    for module, answer in zip(modules, answers, strict=False):
        if isinstance(answer, Missing):
            keys = sorted(info.name for info in module.slots.values())
            contribution.unmatched += [UnmatchedKey(key, answer.tried, answer.nearest) for key in keys]
        else:
            target = resized.get(answer.target.tensor or "", answer.target)
            found.append(_Module(module, answer.rule, target, adapter, config, base))
    orientation = seen_orientation(part.stacked for part in found)
    for part in found:
        contribution.operations += part.operations(orientation)
    read_full_tensors(adapter, config, answers[len(wishes) :], contribution)
    return contribution


def _resized(adapter: AdapterInput, answers: Sequence[Found | Missing]) -> dict[str, Parameter]:
    """Tensors that the adapter brings itself with another number of rows: its factors fit those, not the base's."""
    pairs = zip(adapter.parts.replacements, answers, strict=False)
    found = [(part.info, answer.target) for part, answer in pairs if isinstance(answer, Found)]
    return {
        target.tensor: Parameter(target.name, target.dtype, info.shape, (Piece.whole(target.tensor, info.shape),))
        for info, target in found
        if target.tensor
    }


def _wish(module: ModuleFactors, config: LoraConfig, base: BaseView) -> Wanted:
    parameter = parameter_of(module, config, base)
    a, b = (module.slots[name] for name in sorted(module.slots) if name.endswith(("_A", "_B")))
    shape: tuple[int, ...] | None = None
    inputs = a.shape[1:]
    if config.blocks and config.blocks.side(module) == "A":
        inputs = (a.shape[1] * config.blocks.count,)
    if len(a.shape) > 1 < len(b.shape) and parameter in (None, "weight"):
        shape = (b.shape[0], *inputs) if "lora_A" in module.slots else (a.shape[1], b.shape[0])

    def fits(found: Parameter) -> bool:
        sizes = {math.prod(inputs), b.shape[0]}
        return set(found.shape[-2:]) == sizes or {found.shape[0], math.prod(found.shape[1:])} == sizes

    return Wanted(module.module, (parameter,) if parameter else ("weight", "in_proj_weight"), fits, shape)


class _Module:
    """One adapted module with the parameter it resolved to."""

    def __init__(
        self,
        module: ModuleFactors,
        rule: str,
        target: Parameter,
        adapter: AdapterInput,
        config: LoraConfig,
        base: BaseView,
    ) -> None:
        self.module, self.rule, self.target = module, rule, target
        self.adapter, self.config, self.base = adapter, config, base
        named = parameter_of(module, config, base)
        self.name = f"{module.module}.{named}" if named else module.module
        embedding = "lora_embedding_A" in module.slots
        self.a, self.b = (module.slots[f"lora_embedding_{x}" if embedding else f"lora_{x}"] for x in "AB")
        self.embedding = embedding
        is_stack = bool(named) and len(target.shape) == 3 and len(self.a.shape) == 2
        self.stacked = StackedFactors(target, self.a, self.b, adapter) if is_stack else None

    def operations(self, orientation: bool | None) -> list[Operation]:
        """What this module does; `orientation` is that of the adapter's other experts."""
        if self.stacked:
            return self._experts(self.stacked, orientation)
        side = self.config.blocks.side(self.module) if self.config.blocks else None
        if self.config.blocks and side:
            return self._block_diagonal(side, self.config.blocks.count)
        if len(self.a.shape) == 2 == len(self.b.shape) and self.a.shape[0] != self.b.shape[1]:
            raise self._mismatch()
        if len(self.a.shape) > 2:
            left, right, transposed = self._convolution()
        elif self.embedding:
            left, right, transposed = self._embedding()
        else:
            left, right, transposed = self._linear()
        self._check_rank(right.shape[0])
        scaling = self.config.scaling(self.name, right.shape[0]) * self._repeats()
        operation = self._operation(parameter_place(self.target, transposed=transposed), left, right, scaling)
        return [*placed([*self._taken_from_base(operation, scaling), operation], self.target), *self._bias(scaling)]

    def _operation(self, place: Place, left: FactorView, right: FactorView, scaling: float) -> Operation:
        factors = {"left": left, "right": right}
        formula = "lora"
        if MAGNITUDE in self.module.slots:
            formula = "dora"
            factors["magnitude"] = self._magnitude(place)
            self._refuse_weight("a DoRA adapter")
        elif DIAGONAL in self.module.slots:
            formula, diagonal = "kasa", self.module.slots[DIAGONAL]
            factors["middle"] = FactorView.vector(self.adapter.number, diagonal)
            if diagonal.count != right.shape[0]:
                raise self._mismatch()
        numbers = {"scaling": scaling * self.adapter.weight}
        return Operation(formula, place, self.adapter.number, self.module.module, self.rule, factors, numbers)

    def _linear(self) -> tuple[FactorView, FactorView, bool]:
        """A (r, in), B (out, r) on a weight stored (out, in), or (in, out) for Conv1D: decided by the shapes, and for
        squares by the architecture, else by `fan_in_fan_out`, which PEFT saves for the last module only."""
        if len(self.a.shape) != 2 or len(self.b.shape) != 2:
            raise self._mismatch()
        left, right = self._view(self.b), self._view(self.a)
        shape, logical = self.target.shape, (self.b.shape[0], self.a.shape[1])
        if shape == logical == logical[::-1]:
            architecture = self.base.architecture
            last = self.module.module.rpartition(".")[2]
            transposed = last in architecture.conv1d if architecture else self.config.fan_in_fan_out
        elif shape in (logical, logical[::-1]):
            transposed = shape != logical
        else:
            raise self._mismatch()
        return (right.t, left.t, True) if transposed else (left, right, False)

    def _embedding(self) -> tuple[FactorView, FactorView, bool]:
        """A (r, V), B (d, r) on a table stored (V, d): the delta is `(B @ A)` transposed."""
        if len(self.b.shape) != 2 or self.target.shape != (self.a.shape[1], self.b.shape[0]):
            raise self._mismatch()
        return self._view(self.a).t, self._view(self.b).t, True

    def _convolution(self) -> tuple[FactorView, FactorView, bool]:
        """A (r, in, *kernel), B (out, r, 1, ...) on a kernel (out, in, *kernel): a product of flattened factors."""
        rank, out = self.a.shape[0], self.b.shape[0]
        if self.b.shape[1] != rank:
            raise NotMergeableError(
                (self.a.name, self.b.name),
                f"`{self.module.module}` is a grouped convolution, whose LoRA PEFT does not merge either",
            )
        if self.target.shape != (out, *self.a.shape[1:]) or math.prod(self.b.shape[2:]) != 1:
            raise self._mismatch()
        columns = math.prod(self.a.shape[1:])
        number = self.adapter.number
        return FactorView.matrix(number, self.b, out, rank), FactorView.matrix(number, self.a, rank, columns), False

    def _experts(self, stacked: StackedFactors, orientation: bool | None) -> list[Operation]:
        if MAGNITUDE in self.module.slots or BIAS in self.module.slots:
            raise NotMergeableError(
                (self.a.name,), f"DoRA and biases are not defined for the stacked experts `{self.name}`"
            )
        self._check_rank(stacked.rank)
        scaling = self.config.scaling(self.name, stacked.rank)
        transposed = stacked.transposed(orientation, self.config.peft_version, self.base.architecture)
        operations = [self._operation(*expert, scaling) for expert in stacked.experts(transposed)]
        return list(placed(operations, self.target, stacked=True))

    def _block_diagonal(self, side: str, count: int) -> list[Operation]:
        """BD-LoRA, which PEFT has for a Linear alone: A (r, in / N) or B (out, r / N)."""
        (ranks, inputs), (outputs, columns) = self.a.shape, self.b.shape
        whole = (outputs, inputs * count) if side == "A" else (outputs, inputs)
        fit = columns == ranks if side == "A" else columns * count == ranks and outputs % count == 0
        if not fit or ranks % count or self.target.shape != whole:
            raise self._mismatch()
        self._check_rank(ranks)
        scaling = self.config.scaling(self.name, ranks)
        numbers = {"scaling": scaling * self.adapter.weight, "blocks": float(count), "of_a": float(side == "A")}
        factors = {"A": self._view(self.a), "B": self._view(self.b)}
        place, number = parameter_place(self.target), self.adapter.number
        operation = Operation("bdlora", place, number, self.module.module, self.rule, factors, numbers)
        return [*placed([operation], self.target), *self._bias(scaling)]

    def _repeats(self) -> int:
        """PEFT adds the delta of a MultiheadAttention's `out_proj` twice, in the forward pass as in the merge (0.15 to
        0.21.2): the adapter was trained that way."""
        return 2 if self.module.inside is not None and self.module.module.endswith(".out_proj") else 1

    def _taken_from_base(self, operation: Operation, scaling: float) -> list[Operation]:
        """For unconverted PiSSA and OLoRA, and for KaSA: what PEFT takes out of the base when it loads the adapter."""
        taken = self.config.taken
        if not taken:
            return []
        what = "kasa_config" if self.config.kasa else f"init_lora_weights = {self.config.init}"
        rank = operation.factors["left"].shape[1]
        known = not (self.embedding or len(self.a.shape) > 2)
        if not known or (self.config.kasa and (operation.place.transposed or rank >= min(operation.place.shape))):
            raise NotMergeableError((self.a.name,), f"`{what}` is not defined for `{self.module.module}`")
        self._refuse_weight(f"an adapter with `{what}`")
        numbers = {"rank": float(rank), "scaling": scaling}
        return [replace(operation, formula=taken, factors={}, numbers=numbers, rounding=self.target.dtype)]

    def _bias(self, scaling: float) -> list[Operation]:
        if BIAS not in self.module.slots:
            return []
        delta = self.module.slots[BIAS]
        name = self.target.name.removesuffix("weight") + "bias"
        found = self.base.find(name, delta.shape)
        if found is None or found.target.shape != delta.shape:
            has = f"has shape {list(found.target.shape)}" if found else "is not in the base"
            raise ShapeMismatchError((delta.name,), f"`lora_bias` has {delta.count:,} values for `{name}`, which {has}")
        factors = {"delta": FactorView.vector(self.adapter.number, delta)}
        numbers = {"scaling": scaling * self.adapter.weight}
        place, number = parameter_place(found.target), self.adapter.number
        return list(
            placed([Operation("bias", place, number, self.module.module, found.rule, factors, numbers)], found.target)
        )

    def _magnitude(self, place: Place) -> FactorView:
        info = self.module.slots[MAGNITUDE]
        channels = place.shape[1] if place.transposed else place.shape[0]
        if info.count != channels:
            raise ShapeMismatchError(
                (info.name,),
                f"the magnitude has {info.count:,} values, `{self.target.name}` has {channels:,} output features",
            )
        return FactorView.vector(self.adapter.number, info)

    def _check_rank(self, rank: int) -> None:
        claimed = self.config.rank_of(self.name)
        if claimed is not None and claimed != rank:
            reason = f"the factors of `{self.name}` have rank {rank}, the config says {claimed}"
            raise ConfigContradictionError(
                (self.a.name, self.b.name), reason, "the file and the config do not belong together"
            )

    def _refuse_weight(self, what: str) -> None:
        if self.adapter.weight != 1:
            raise CompositionError(
                (self.module.module,), f"{what} has no weighted form; its `--weight` is {self.adapter.weight:g}"
            )

    def _view(self, info: TensorInfo) -> FactorView:
        return FactorView.matrix(self.adapter.number, info, *info.shape)

    def _mismatch(self) -> AdapterError:
        shapes = f"A {list(self.a.shape)} and B {list(self.b.shape)}"
        stored = f"`{self.target.name}` in the base has shape {list(self.target.shape)}"
        reason = f"`{self.module.module}` has factors {shapes}, {stored}"
        advice = (
            "the base has another vocabulary than the adapter's"
            if self.embedding
            else "is this the base the adapter was trained on?"
        )
        return ShapeMismatchError((self.a.name, self.b.name), reason, advice)
