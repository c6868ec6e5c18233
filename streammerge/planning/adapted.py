"""A plan seen from the adapter: one entry for each adapted module, with the places it changes.

A plan lists tensors and what happens to each; an adapter has modules, and one of them may change hundreds of tensors.
Owns that regrouping. The invariant: every operation and every replacement of the plan is in exactly one entry.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.core.lines import Lines, all_lines
from streammerge.core.tensors import BASE, MatrixView, Operation, OutputTensor, Place, Replacement, Stored, TensorInfo
from streammerge.planning.model import MergePlan, OperationFacts

_TABLE_ROW = re.compile(r"[^\s,`]+\[\d+\]")
_QUOTED = re.compile(r"`[^`]*`")
_LAYOUTS = frozenset({"fused", "split"})
"""Rules that a row of the table of fused layouts stands behind."""


@dataclass(frozen=True, slots=True)
class Target:
    """A place that a module changes. `file` holds the tensor, None for one that is new; `origin` is the base's name of
    it, where that is another: the other side of a tie, or the layer that this one is a copy of. `indices` are the rows
    of the place, where not all of them change."""

    place: Place
    file: str | None
    origin: str | None = None
    indices: tuple[int, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """The target as plain JSON values: lines as [start, size, step, count, pitch], `matrix` the number of an expert
        or None for a tensor that is one matrix."""
        place = self.place
        return {
            "tensor": place.tensor,
            "file": self.file,
            "origin": self.origin,
            "matrix": place.matrix if place.view.stack > 1 else None,
            "rows": _numbers(place.rows),
            "cols": _numbers(place.cols),
            "transposed": place.transposed,
            "indices": list(self.indices),
        }


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """What one module of an adapter does: the adapter tensors it takes (`keys`), the parameter's name in the model, the
    rules that found it (a bias may have its own), the formulas, and every place. `norm` is the Frobenius norm of its
    delta, None where the factors do not tell it."""

    adapter: int
    module: str
    parameter: str
    rules: tuple[str, ...]
    formulas: tuple[str, ...]
    keys: tuple[str, ...]
    targets: tuple[Target, ...]
    rank: int | None
    scaling: float | None
    norm: float | None
    zero: bool


Step = tuple[Operation, OperationFacts, Target]


def adapted_modules(plan: MergePlan, files: Mapping[str, str]) -> list[AdaptedModule]:
    """Every adapted module of a plan, in the order of the tensors; `files` says which file holds a tensor."""
    replaced: dict[tuple[int, str], list[OutputTensor]] = {}
    steps: dict[tuple[int, str, str, bool], list[Step]] = {}
    biases: dict[tuple[int, str], list[Step]] = {}
    for output in plan.changed:
        if isinstance(output.source, Replacement):
            replaced.setdefault((output.source.adapter, output.source.key), []).append(output)
        for operation, facts in zip(output.operations, plan.facts[output.name], strict=True):
            target = Target(operation.place, files.get(output.name), _origin(output), operation.indices)
            step = operation, facts, target
            if operation.formula == "bias":
                biases.setdefault((operation.adapter, operation.module), []).append(step)
            else:
                rows = operation.formula == "token_rows"
                steps.setdefault((operation.adapter, operation.module, operation.parameter, rows), []).append(step)
    entries = [_of_replacement(outputs, files) for outputs in replaced.values()]
    return entries + [_of_steps(own, [] if key[3] else biases.get(key[:2], [])) for key, own in steps.items()]


def _of_steps(steps: list[Step], biases: list[Step]) -> AdaptedModule:
    """The entry of operations on one parameter, and of those on its bias."""
    first = steps[0][0]
    ranks = [operation.factors["left"].shape[1] for operation, _, _ in steps if "left" in operation.factors]
    # Both sides of a tie may get the same delta, which is one delta of the adapter's.
    deltas = {tuple(sorted(operation.factors.items(), key=_name)): facts for operation, facts, _ in steps}
    norms = [facts.norm for facts in deltas.values()]
    scalings = [op.numbers["scaling"] for op, _, _ in steps if "left" in op.factors]
    every = [*steps, *biases]
    return AdaptedModule(
        adapter=first.adapter,
        module=first.module,
        parameter=first.parameter,
        rules=tuple(dict.fromkeys(operation.rule for operation, _, _ in every)),
        formulas=tuple(dict.fromkeys(operation.formula for operation, _, _ in every)),
        keys=tuple(dict.fromkeys(key for operation, _, _ in every for key in _keys(operation))),
        targets=tuple(dict.fromkeys(target for _, _, target in every)),
        rank=ranks[0] if ranks else None,
        scaling=scalings[0] if scalings else None,
        norm=None if None in norms else sum(norm * norm for norm in norms if norm) ** 0.5,
        zero=all(facts.zero for _, facts, _ in every),
    )


def _keys(operation: Operation) -> Iterator[str]:
    """The adapter's tensors that an operation uses."""
    return (view.key for view in operation.factors.values() if view.adapter != BASE)


def _name(item: tuple[str, Any]) -> str:
    return item[0]


def _of_replacement(outputs: list[OutputTensor], files: Mapping[str, str]) -> AdaptedModule:
    """The entry of a tensor of the adapter that replaces one of the base, or both sides of a tie."""
    source = outputs[0].source
    if not isinstance(source, Replacement):
        raise TypeError(f"`{outputs[0].name}` is no replacement")
    targets = [Target(_whole(output), files.get(output.name)) for output in outputs]
    return AdaptedModule(
        adapter=source.adapter,
        module=source.module,
        parameter=source.parameter,
        rules=(source.rule,),
        formulas=("replacement",),
        keys=(source.key,),
        targets=tuple(targets),
        rank=None,
        scaling=None,
        norm=None,
        zero=False,
    )


def _origin(output: OutputTensor) -> str | None:
    source = output.source
    return source.name if isinstance(source, Stored) and source.name != output.name else None


def _whole(output: OutputTensor) -> Place:
    view = MatrixView.of(output.shape)
    return Place(output.name, view, 0, all_lines(view.rows), all_lines(view.cols))


def _numbers(lines: Lines) -> list[int]:
    return [lines.start, lines.size, lines.step, lines.count, lines.pitch]


# --- files ------------------------------------------------------------------------------------------------------------
def output_files(plan: MergePlan) -> dict[str, str]:
    """The file of the output that holds each tensor."""
    return {name: shard.file for shard in plan.shards for name in shard.offsets}


def base_files(plan: MergePlan, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The file of the base that holds each tensor of the output, those it does not have left out."""
    sources = {
        name: output.source.name if isinstance(output.source, Stored) else name for name, output in plan.tensors.items()
    }
    return {name: tensors[source].file for name, source in sources.items() if source in tensors}


# --- rules ------------------------------------------------------------------------------------------------------------
def rule_family(rule: str) -> str:
    """The rule without what it was applied to: `fused` of `fused: part 1 of 3 of ...`."""
    return re.split(r"[:,]", rule, maxsplit=1)[0]


def table_rows(rule: str) -> tuple[str, ...]:
    """The rows of the table of conversions that took part in a rule."""
    return tuple(_TABLE_ROW.findall(_QUOTED.sub("", rule)))


def rules_of(outputs: Iterable[OutputTensor]) -> set[str]:
    """Every rule by which a name was found."""
    found = {operation.rule for output in outputs for operation in output.operations}
    return found | {output.source.rule for output in outputs if isinstance(output.source, Replacement)}


def rules_summary(modules: Iterable[tuple[str, ...]]) -> str:
    """How many modules were found by which rule, `480 exact, 80 converted (mixtral[0], mixtral[1])`; one item for each
    module, its rules, of which the first is that of the module itself."""
    counts: Counter[str] = Counter()
    rows: dict[str, dict[str, None]] = {}
    for rules in modules:
        family = rule_family(rules[0])
        counts[family] += 1
        rows.setdefault(family, {}).update(dict.fromkeys(row for rule in rules for row in table_rows(rule)))
    texts = [(f"{count:,} {family}", ", ".join(rows[family])) for family, count in counts.most_common()]
    return ", ".join(f"{text} ({used})" if used else text for text, used in texts)


def unknown_base(config: Mapping[str, Any] | None, rules: Iterable[str]) -> str:
    """The note on a base whose architecture is not in the table; `rules` are those by which names were found in it."""
    section = config or {}
    named = (section.get("architectures") or [section.get("model_type")])[0]
    known = "there is no config.json" if not config else f"`{named}` is not in the table of architectures"
    joined = "names were joined as they are and by prefixes, without knowledge of ties"
    rows = {row for rule in rules for row in (*table_rows(rule), *({rule_family(rule)} & _LAYOUTS))}
    used = f"of the table only {', '.join(sorted(rows))} was used" if rows else "no row of the table was used"
    return f"{known}: {joined}; {used}"
