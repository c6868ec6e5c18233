"""What is in an adapter, module by module, and what it would touch in a base. Reads values with numpy, never torch.

Without a base, modules are described by their factors alone; with one, by the operations of the very plan that a run
would carry out, so that inspection and merge cannot disagree. What the base refuses is set aside and noted, so that the
rest is shown as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streammerge.core.errors import AdapterError, UnmatchedKeysError
from streammerge.core.lines import Lines
from streammerge.core.options import Options
from streammerge.core.tensors import FactorView, Operation, Place, TensorInfo
from streammerge.methods import METHODS
from streammerge.methods.lora_config import LoraConfig, parse_config
from streammerge.methods.parts import FullTensor, ModuleFactors, Parts
from streammerge.methods.readers import positions_of, refuse_type
from streammerge.names.architectures import architecture_of
from streammerge.planning.adapted import AdaptedModule, Target, adapted_modules, base_files, unknown_base
from streammerge.planning.build import build_plan
from streammerge.planning.model import MergePlan
from streammerge.planning.values import check_finite, operation_facts, parts_of
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import Checkpoint

STATUS_VERSION = 2
ATTEMPTS = 8
"""Plans that are tried, each without what the ones before refused: every attempt reads the adapter again."""


@dataclass(frozen=True, slots=True)
class ModuleStatus:
    """One adapted module: rank, alpha, scaling, Frobenius norm of its delta (None where the factors do not tell it),
    whether it is zero, and `keys`, its tensors in the adapter. With a base: the parameter's `canonical` name in the
    model, the rule that found it, and every place that changes; or the `problem` that it has none."""

    module: str
    kind: str
    rank: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    norm: float | None = None
    zero: bool = False
    keys: tuple[str, ...] = ()
    canonical: str | None = None
    rules: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()
    problem: str | None = None

    def as_data(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        plain = ("module", "kind", "rank", "alpha", "scaling", "norm", "zero", "canonical", "problem")
        return {name: getattr(self, name) for name in plain} | {
            "keys": list(self.keys),
            "rule": "; ".join(self.rules) or None,
            "targets": [target.as_data() for target in self.targets],
        }


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What an adapter holds. `refusals` are why it cannot be merged, or not into this base, the first one that which a
    run would end with; `notes` are those of the plan, `ignored` the keys that a rule lets go."""

    identity: str
    peft_type: str
    modules: tuple[ModuleStatus, ...]
    tensors: int
    siblings: tuple[str, ...]
    refusals: tuple[AdapterError, ...] = ()
    notes: tuple[str, ...] = ()
    ignored: Mapping[str, str] | None = None

    @property
    def refusal(self) -> AdapterError | None:
        """The first refusal, if there is one."""
        return self.refusals[0] if self.refusals else None

    def as_data(self) -> dict[str, Any]:
        """The status as plain JSON values."""
        return {
            "version": STATUS_VERSION,
            "id": self.identity,
            "peft_type": self.peft_type,
            "tensors": self.tensors,
            "modules": [module.as_data() for module in self.modules],
            "siblings": list(self.siblings),
            "notes": list(self.notes),
            "ignored": dict(self.ignored or {}),
            "refusal": self.refusal.data() if self.refusal else None,
            "refusals": [error.data() for error in self.refusals],
        }


def inspect_adapter(adapter: Adapter, checkpoint: Checkpoint | None, options: Options) -> AdapterStatus:
    """The status of an adapter, resolved against a base if one is given."""
    parts = parts_of(adapter)
    facts = adapter.facts
    kind = str(facts.config.get("peft_type", "?")).upper()
    status = AdapterStatus(facts.identity, kind, (), len(facts.tensors), facts.siblings, ignored=parts.ignored)
    try:
        if refuse_type(facts.config) == "LORA":
            config = parse_config(facts.config, options.ignore_config_field)
            status = replace(status, modules=_by_factors(adapter, parts, config))
        else:
            METHODS[kind].known.check(facts.config, options.ignore_config_field)
            status = replace(status, modules=_by_slots(parts, kind))
        check_finite(adapter, positions_of(parts, kind))
    except AdapterError as error:
        status = _refused(status, error, _blamed(error, status.modules))
    return status if checkpoint is None or not status.modules else _against(adapter, checkpoint, options, status)


# --- with a base ------------------------------------------------------------------------------------------------------
def _against(adapter: Adapter, checkpoint: Checkpoint, options: Options, status: AdapterStatus) -> AdapterStatus:
    """The status with what becomes of each module in the base, as far as there is a plan without what is refused."""
    left = adapter.without({key for module in status.modules if module.problem for key in module.keys})
    for _ in range(ATTEMPTS):
        try:
            plan = build_plan(checkpoint, [left], [1.0], options)
        except AdapterError as error:
            blamed = _blamed(error, status.modules) & left.facts.tensors.keys()
            if blamed or not status.refusals:
                status = _refused(status, error, blamed)
            left = left.without(blamed)
            if not blamed or not left.facts.tensors:
                break
        else:
            return _placed(status, plan, base_files(plan, checkpoint.facts.tensors))
    config = checkpoint.facts.config
    unknown = not config or architecture_of(config) is None
    return replace(status, notes=(unknown_base(config, ()),)) if unknown else status


def _blamed(error: AdapterError, modules: Sequence[ModuleStatus]) -> set[str]:
    """The adapter tensors that a refusal is about: those it names, with all others of their modules."""
    if isinstance(error, UnmatchedKeysError):
        about = {item.key for item in error.unmatched}
    else:
        about = set(getattr(error, "about", ()))
    return {key for module in modules if module.module in about or about & {*module.keys} for key in module.keys}


def _refused(status: AdapterStatus, error: AdapterError, blamed: Collection[str]) -> AdapterStatus:
    """The status with one more refusal, noted at the modules that it is about."""
    problem = "matches no tensor in the base" if isinstance(error, UnmatchedKeysError) else error.summary()
    modules = [
        replace(module, problem=problem) if set(module.keys) & set(blamed) and not module.problem else module
        for module in status.modules
    ]
    return replace(status, modules=tuple(modules), refusals=(*status.refusals, error))


def _placed(status: AdapterStatus, plan: MergePlan, files: Mapping[str, str]) -> AdapterStatus:
    """The status with the entries of a plan in place of what the factors alone say."""
    owners = {key: number for number, module in enumerate(status.modules) for key in module.keys}
    modules = list(status.modules)
    for entry in adapted_modules(plan, files):
        number = owners[entry.keys[0]]
        modules[number] = _of_entry(modules[number], entry)
    ignored = plan.adapters[0].ignored
    for number, module in enumerate(modules):
        rule = next((ignored[key] for key in module.keys if key in ignored), None)
        if rule and not module.targets and not module.problem:
            modules[number] = replace(module, problem=f"not used: {rule}")
    return replace(status, modules=tuple(modules), notes=plan.notes, ignored=ignored)


def _of_entry(known: ModuleStatus, entry: AdaptedModule) -> ModuleStatus:
    return replace(
        known,
        kind=" + ".join(entry.formulas),
        rank=entry.rank,
        scaling=entry.scaling,
        norm=entry.norm,
        zero=entry.zero,
        canonical=entry.parameter,
        rules=entry.rules,
        targets=entry.targets,
    )


# --- without one ------------------------------------------------------------------------------------------------------
def _by_factors(adapter: Adapter, parts: Parts, config: LoraConfig) -> tuple[ModuleStatus, ...]:
    full = [*((part, "replacement") for part in parts.replacements), *((part, "token rows") for part in parts.tokens)]
    found = [_factor_status(adapter, module, config) for module in parts.modules]
    return (*found, *(_full_status(part, kind) for part, kind in full))


def _by_slots(parts: Parts, kind: str) -> tuple[ModuleStatus, ...]:
    """Modules of another type than LoRA: what they do to the base, the factors alone do not tell."""
    full = [*((part, "replacement") for part in parts.replacements), *((part, "token rows") for part in parts.tokens)]
    found = [
        ModuleStatus(module.module, kind.lower(), keys=tuple(info.name for info in module.slots.values()))
        for module in parts.modules
        if module.module
    ]
    return (*found, *(_full_status(part, name) for part, name in full))


def _full_status(part: FullTensor, kind: str) -> ModuleStatus:
    return ModuleStatus(part.name, kind, keys=(part.key.key,))


def _factor_status(adapter: Adapter, module: ModuleFactors, config: LoraConfig) -> ModuleStatus:
    """Rank and norm of one pair of factors. Those of stacked experts are told apart by the rank that the config claims,
    where it claims one for all."""
    keys = tuple(info.name for info in module.slots.values())
    pair = [info for slot, info in sorted(module.slots.items()) if slot.endswith(("_A", "_B"))]
    if len(pair) != 2:
        return ModuleStatus(module.module, "incomplete", keys=keys)
    a, b = pair
    rank, claimed = a.shape[0], config.rank_of(module.module)
    dora = "lora_magnitude_vector" in module.slots
    kind = "dora" if dora else "lora"
    stacked = bool(config.target_parameters) and claimed is not None and rank != claimed
    if stacked and (config.rank_pattern or rank % (claimed or 1)):
        return ModuleStatus(module.module, kind, keys=keys)
    rank = (claimed or rank) if stacked else rank
    scaling = config.scaling(module.module, rank)
    facts = [operation_facts(operation, [adapter]) for operation in _products(a, b, rank, scaling)]
    norms = [fact.norm for fact in facts if fact.norm is not None]
    return ModuleStatus(
        module.module,
        kind,
        rank,
        scaling * (rank**0.5 if config.rslora else rank),
        scaling,
        sum(norm * norm for norm in norms) ** 0.5 if norms else None,
        bool(facts) and all(fact.zero for fact in facts) and not dora,
        keys,
    )


def _products(a: TensorInfo, b: TensorInfo, rank: int, scaling: float) -> Iterator[Operation]:
    """The product of two factors, or of those of each expert where they hold several ranks: A expert by expert, B rank
    by rank. Nothing for factors that are no matrices of this rank."""
    experts = a.shape[0] // rank if rank else 0
    if not experts or a.count % a.shape[0] or b.count % a.shape[0]:
        return
    out, into = b.count // a.shape[0], a.count // a.shape[0]
    place = Place.whole(TensorInfo("", "F32", (out, into), "", 0, 0))
    for e in range(experts):
        left = FactorView(0, b.name, b.dtype, b.count, (Lines(0, out, rank * experts), Lines(e, rank, experts)))
        right = FactorView(0, a.name, a.dtype, a.count, (Lines(e * rank * into, rank, into), Lines(0, into)))
        yield Operation("lora", place, 0, "", "", {"left": left, "right": right}, {"scaling": scaling})
