"""LoRA on stacked experts and other bare parameters (PEFT `target_parameters`, its ParamWrapper).

The key does not name the parameter: wrappers nest in the order in which the module registers its parameters, the first
one innermost. A holds its rows expert by expert, B its columns rank by rank. Which way round the factors lie changed
with PEFT 0.19.0 and 0.19.1; the shapes tell, except for square experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streammerge.core.errors import NotMergeableError, ShapeMismatchError
from streammerge.core.lines import Lines
from streammerge.core.tensors import FactorView, Place, TensorInfo
from streammerge.methods.lora_config import LoraConfig
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.placing import parameter_place
from streammerge.methods.reading import AdapterInput, BaseView
from streammerge.names.architectures import Architecture
from streammerge.names.pieces import Parameter

REGISTRATION_ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias")
"""Of every experts module in transformers 5.23; used where the architecture's own order is not known."""


def parameter_of(module: ModuleFactors, config: LoraConfig, base: BaseView) -> str | None:
    """The parameter these factors belong to, or None if the module is not one of `target_parameters`."""
    names = [name.rpartition(".")[2] for name in config.target_parameters if _is_in(name, module.module, base)]
    if not names:
        return None
    architecture = base.architecture
    orders = [*(architecture.expert_orders if architecture else ()), REGISTRATION_ORDER]
    order = next((order for order in orders if set(names) <= set(order)), ())
    if len(names) > 1 and not order:
        raise NotMergeableError(
            tuple(names), f"the order in which `{module.module}` registers its parameters is not known"
        )
    ranked = sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else 0)
    position = len(ranked) - 1 - module.depth
    if position < 0:
        keys = tuple(info.name for info in module.slots.values())
        raise NotMergeableError(
            keys, f"wrapper depth {module.depth}, but the config targets {len(ranked)} parameters of `{module.module}`"
        )
    return ranked[position]


def _is_in(target: str, module: str, base: BaseView) -> bool:
    """Whether PEFT finds the target in a module: by the end of its path, where the target has one, else in every module
    that has such a parameter."""
    path, _, name = target.rpartition(".")
    if path:
        return module == path or module.endswith(f".{path}")
    return f"{module.rpartition('.')[2]}.{name}" in base.resolver.catalog.endings


class StackedFactors:
    """The factors of stacked experts (E, rows, cols) in the model's orientation: A (E x r, a) and B (b, r x E).

    Raises ShapeMismatchError where they do not fit the parameter.
    """

    def __init__(self, target: Parameter, a: TensorInfo, b: TensorInfo, adapter: AdapterInput) -> None:
        self.target, self.a, self.b, self.adapter = target, a, b, adapter
        experts, rows, cols = target.shape
        self.rank = a.shape[0] // experts
        fits = len(b.shape) == 2 and a.shape[0] == self.rank * experts == b.shape[1]
        if not fits or (a.shape[1], b.shape[0]) not in ((cols, rows), (rows, cols)):
            reason = (
                f"A {list(a.shape)} and B {list(b.shape)} do not fit the experts `{target.name}` {list(target.shape)}"
            )
            raise ShapeMismatchError((a.name, b.name), reason)

    @property
    def told(self) -> bool | None:
        """Whether the delta is `(B @ A)` transposed, as the shapes tell; None where rows and columns are as many."""
        _, rows, cols = self.target.shape
        return None if rows == cols else (self.a.shape[1], self.b.shape[0]) == (rows, cols)

    def transposed(
        self, seen: bool | None, peft_version: tuple[int, ...] | None, architecture: Architecture | None
    ) -> bool:
        """Whether the delta is `(B @ A)` transposed. Of square experts: as the adapter's other experts are, else as
        this version of PEFT does it: always up to 0.19.0, never after; a config without a version is older than 0.18.

        Raises NotMergeableError where that is not enough: PEFT asks modules whether they are `is_transposed`, which
        only transformers 5 tells it, and some experts lie the other way round in transformers 4. No adapter says which
        it was trained with.
        """
        if self.told is not None:
            return self.told
        if self.adapter.expert_orientation != "auto":
            return self.adapter.expert_orientation == "transposed"
        if seen is not None:
            return seen
        version = peft_version or (0, 17, 0)
        turned = any(cut.swapped for cuts in self.target.cuts(stacked=True) for cut in cuts)
        asked = version >= (0, 19, 0) and (architecture is None or architecture.experts_transposed)
        if turned or asked:
            reason = f"the experts `{self.target.name}` are square, and the adapter does not say which way they lie"
            advice = (
                "say so: `--expert-orientation straight` if B @ A has the rows and columns of the model's parameter"
            )
            gpt_oss = "gpt-oss with PEFT 0.19.1 or later: transposed under transformers 5, straight under 4"
            raise NotMergeableError((self.a.name, self.b.name), reason, f"{advice}, else `transposed` ({gpt_oss})")
        return version < (0, 19, 1)

    def experts(self, transposed: bool) -> Iterator[tuple[Place, FactorView, FactorView]]:
        """Place in the parameter, left and right factor, of each expert."""
        a, b, rank, number = self.a, self.b, self.rank, self.adapter.number
        experts, inner = self.target.shape[0], a.shape[1]
        first = parameter_place(self.target, 0, transposed=transposed)
        out, into = Lines(0, b.shape[0], rank * experts), Lines(0, inner)
        for e in range(experts):
            a_KI = FactorView(number, a.name, a.dtype, a.count, (Lines(e * rank * inner, rank, inner), into))
            # PEFT lays the columns of B out rank by rank; Unsloth trained with them expert by expert.
            own = Lines(e * rank, rank) if self.adapter.expert_packing == "unsloth" else Lines(e, rank, experts)
            b_OK = FactorView(number, b.name, b.dtype, b.count, (out, own))
            place = Place(first.tensor, first.view, e, first.rows, first.cols, transposed)
            yield (place, a_KI.t, b_OK.t) if transposed else (place, b_OK, a_KI)


def seen_orientation(stacks: Iterable[StackedFactors | None]) -> bool | None:
    """Which way round the experts of one adapter lie, as those tell that are not square; None if none does."""
    told = {stack.told for stack in stacks if stack and stack.told is not None}
    return told.pop() if len(told) == 1 else None
