"""What is in an adapter, module by module, and what it would touch in a base. Reads values with numpy, never torch.

Without a base, modules are described by their factors alone; with one, by the operations of the very plan that a run
would carry out, so that inspection and merge cannot disagree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from streammerge.core.errors import AdapterError
from streammerge.core.options import Options
from streammerge.core.tensors import FactorView, Operation, Place, Replacement, TensorInfo
from streammerge.methods.lora_config import LoraConfig, parse_config
from streammerge.methods.parts import ModuleFactors, Parts
from streammerge.methods.readers import READERS, refuse_type
from streammerge.planning.build import build_plan
from streammerge.planning.values import check_finite, operation_facts, parts_of
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class ModuleStatus:
    """One adapted module: rank, alpha, scaling, Frobenius norm of its delta (None where it depends on W), whether it is
    zero, and with a base its target and the rule that found it."""

    module: str
    kind: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    norm: float | None
    zero: bool
    target: str | None = None
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What an adapter holds. `refusal` is why it cannot be merged, or not into this base, if it cannot."""

    identity: str
    peft_type: str
    modules: tuple[ModuleStatus, ...]
    tensors: int
    siblings: tuple[str, ...]
    refusal: AdapterError | None = None

    def as_data(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        return {
            "version": 1,
            "id": self.identity,
            "peft_type": self.peft_type,
            "tensors": self.tensors,
            "modules": [asdict(module) for module in self.modules],
            "siblings": list(self.siblings),
            "refusal": self.refusal.data() if self.refusal else None,
        }


def inspect_adapter(adapter: Adapter, checkpoint: Checkpoint | None, options: Options) -> AdapterStatus:
    """The status of an adapter, resolved against a base if one is given."""
    parts = parts_of(adapter)
    kind = str(adapter.facts.config.get("peft_type", "?")).upper()
    refusal: AdapterError | None = None
    modules: tuple[ModuleStatus, ...] = ()
    try:
        if kind in READERS:
            modules = _by_factors(adapter, parts, parse_config(adapter.facts.config, options.ignore_config_field))
            check_finite(adapter)
        else:
            refuse_type(adapter.facts.config)
        if checkpoint is not None:
            modules = _by_plan(adapter, checkpoint, options, modules)
    except AdapterError as error:
        refusal = error
    return AdapterStatus(
        adapter.facts.identity, kind, modules, len(adapter.facts.tensors), adapter.facts.siblings, refusal
    )


def _by_factors(adapter: Adapter, parts: Parts, config: LoraConfig) -> tuple[ModuleStatus, ...]:
    found = [_factor_status(adapter, module, config) for module in parts.modules]
    found += [ModuleStatus(part.name, "replacement", None, None, None, None, zero=False) for part in parts.replacements]
    found += [ModuleStatus(part.name, "token rows", None, None, None, None, zero=False) for part in parts.tokens]
    return tuple(found)


def _factor_status(adapter: Adapter, module: ModuleFactors, config: LoraConfig) -> ModuleStatus:
    """Rank and norm of one pair of factors, taken as plain matrices."""
    pair = [info for slot, info in sorted(module.slots.items()) if slot.endswith(("_A", "_B"))]
    if len(pair) != 2:
        return ModuleStatus(module.module, "incomplete", None, None, None, None, zero=False)
    a, b = pair
    rank = a.shape[0]
    scaling = config.scaling(module.module, rank)
    dora = "lora_magnitude_vector" in module.slots
    norm: float | None = None
    zero = False
    if rank and a.count % rank == 0 and b.count % rank == 0:
        left, right = FactorView.matrix(0, b, b.count // rank, rank), FactorView.matrix(0, a, rank, a.count // rank)
        stand_in = TensorInfo("", "F32", (left.shape[0], right.shape[1]), "", 0, 0)
        operation = Operation(
            "lora", Place.whole(stand_in), 0, "", "", {"left": left, "right": right}, {"scaling": scaling}
        )
        facts = operation_facts(operation, [adapter])
        norm, zero = facts.norm, facts.zero and not dora
    return ModuleStatus(
        module.module,
        "dora" if dora else "lora",
        rank,
        scaling * (rank**0.5 if config.rslora else rank),
        scaling,
        norm,
        zero,
    )


def _by_plan(
    adapter: Adapter, checkpoint: Checkpoint, options: Options, before: tuple[ModuleStatus, ...]
) -> tuple[ModuleStatus, ...]:
    plan = build_plan(checkpoint, [adapter], [1.0], options)
    by_module = {status.module: status for status in before}
    found: list[ModuleStatus] = []
    for output in plan.changed:
        if isinstance(output.source, Replacement):
            found.append(
                ModuleStatus(output.source.key, "replacement", None, None, None, None, zero=False, target=output.name)
            )
        for operation, facts in zip(output.operations, plan.facts[output.name], strict=True):
            known = by_module.get(operation.module)
            rank = operation.factors["left"].shape[1] if "left" in operation.factors else None
            target = f"{output.name}[{operation.place.matrix}]" if operation.place.view.stack > 1 else output.name
            found.append(
                ModuleStatus(
                    operation.module,
                    operation.formula,
                    rank,
                    known.alpha if known else None,
                    operation.numbers.get("scaling"),
                    facts.norm,
                    facts.zero,
                    target,
                    operation.rule,
                )
            )
    return tuple(found)
