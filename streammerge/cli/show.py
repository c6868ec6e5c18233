"""Plans and adapters as text for people, within 80 columns where names allow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from streammerge.cli.output import table
from streammerge.core import io
from streammerge.core.errors import UnmatchedKeysError
from streammerge.core.tensors import OutputTensor, Replacement
from streammerge.core.text import count_text, printable, size_text
from streammerge.inspection import AdapterStatus, ModuleStatus
from streammerge.methods import FORMULAS
from streammerge.planning.model import MergePlan
from streammerge.progress import duration_text

SHOWN = 12
ASSUMED_RATE = 400e6
"""Bytes read and written per second for the time figure: a modest disk doing both at once."""


def plan_text(plan: MergePlan, output: str | None, *, verbose: bool) -> str:
    """What a run would do and take."""
    figures = plan.figures
    files, workers = count_text(len(plan.base.files), "file"), count_text(figures.workers, "worker")
    lines = [
        f"base      {printable(plan.base.identity)}, {files}, {size_text(figures.read)}",
        *(
            f"adapter   {printable(item.identity)}, weight {item.weight:g}, digest {item.digest[:12]}"
            for item in plan.adapters
        ),
        f"output    {count_text(len(plan.shards), 'file')}, {size_text(figures.write)}{_free(output)}",
        f"changed   {_changed(plan)}",
        *(f"          {line}" for line in _formulas(plan)),
        f"names     {', '.join(f'{count} by {rule}' for rule, count in _rules(plan).most_common())}",
        f"memory    {size_text(figures.memory)} for {workers}, beside the imported libraries",
        f"time      about {duration_text(figures.write / ASSUMED_RATE)} at {size_text(ASSUMED_RATE)}/s",
    ]
    lines += [f"config    {printable('.'.join(path))} = {value!r}" for path, value in plan.config_edits]
    lines += [f"ignored   {printable(key)} ({rule})" for item in plan.adapters for key, rule in item.ignored.items()]
    lines += [f"code      {printable(name)} is copied; loaders may run it" for name in plan.code]
    lines += [f"note      {printable(note)}" for note in plan.notes]
    return "\n".join([*lines, "", _tensor_table(plan, None if verbose else SHOWN)])


def status_text(status: AdapterStatus, *, verbose: bool) -> str:
    """The modules of an adapter as a table."""
    tensors, modules = count_text(status.tensors, "tensor"), count_text(len(status.modules), "module")
    head = f"{printable(status.peft_type)} adapter, {tensors}, {modules}"
    zero = [module for module in status.modules if module.zero]
    if zero:
        head += f", {len(zero)} without effect (B = 0)"
    if not status.modules:
        return head
    resolved = any(module.target for module in status.modules)
    header = ["module", "rank", "alpha", "scaling", "norm of delta", *(["target", "rule"] if resolved else [])]
    shown = status.modules if verbose or resolved else status.modules[:SHOWN]
    text = table(header, [_module_row(module, resolved) for module in shown], right=(1, 2, 3, 4))
    more = len(status.modules) - len(shown)
    siblings = (
        [f"other adapters in subfolders: {', '.join(map(printable, status.siblings))}"] if status.siblings else []
    )
    cut = [f"... {more} more, all of them with -v"] if more else []
    return "\n".join([head, *siblings, "", text, *cut, *_without_target(status)])


def _without_target(status: AdapterStatus) -> list[str]:
    """Every adapter key that the base has no tensor for; the error that follows shows the first few."""
    if not isinstance(status.refusal, UnmatchedKeysError):
        return []
    keys = [printable(item.key) for item in status.refusal.unmatched]
    return ["", "keys without a tensor in the base:", *(f"  {key}" for key in keys)]


def _module_row(module: ModuleStatus, resolved: bool) -> list[str]:
    norm = "zero" if module.zero else f"{module.norm:.4g}" if module.norm is not None else module.kind
    numbers = [_number(module.rank), _number(module.alpha), _number(module.scaling), norm]
    return [module.module, *numbers, *([module.target or "-", module.rule or "-"] if resolved else [])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _free(output: str | None) -> str:
    if output is None:
        return ""
    path = next((p for p in _ancestors(output) if io.exists(p)), "/")
    return f" ({size_text(io.free_space(path))} free)"


def _ancestors(path: str) -> list[str]:
    from pathlib import Path

    absolute = Path(path).absolute()
    return [str(p) for p in (absolute, *absolute.parents)]


def _changed(plan: MergePlan) -> str:
    zero = sum(fact.zero for facts in plan.facts.values() for fact in facts)
    changed, operations = count_text(len(plan.changed), "tensor"), count_text(len(plan.operations), "operation")
    text = f"{changed} of {len(plan.tensors):,}, by {operations}"
    return text + (f" ({zero} of them zero: B = 0)" if zero else "")


def _formulas(plan: MergePlan) -> Sequence[str]:
    counts = Counter(operation.formula for operation in plan.operations)
    replaced = sum(isinstance(tensor.source, Replacement) for tensor in plan.tensors.values())
    lines = [f"{count:,} x {FORMULAS[name].title}" for name, count in counts.most_common()]
    return [*lines, f"{replaced:,} x the adapter's own tensor"] if replaced else lines


def _rules(plan: MergePlan) -> Counter[str]:
    return Counter(operation.rule for operation in plan.operations) or Counter({"replacement": len(plan.changed)})


def _tensor_table(plan: MergePlan, limit: int | None) -> str:
    changed = plan.changed
    rows = [_tensor_row(tensor, plan) for tensor in changed[:limit]]
    text = table(["tensor", "shape", "dtype", "rank", "norm of delta"], rows, right=(3, 4))
    more = len(changed) - len(rows)
    return f"{text}\n... {more:,} more, all of them with -v" if more > 0 else text


def _tensor_row(tensor: OutputTensor, plan: MergePlan) -> list[str]:
    ranks = {operation.factors["left"].shape[1] for operation in tensor.operations if "left" in operation.factors}
    norms = [fact.norm for fact in plan.facts[tensor.name]]
    if not norms:
        norm = "replaced"
    elif None in norms:
        norm = "depends on W"
    else:
        norm = f"{sum(n * n for n in norms if n) ** 0.5:.4g}"
    shape = "x".join(map(str, tensor.shape))
    return [tensor.name, shape, tensor.dtype, "/".join(map(str, sorted(ranks))) or "-", norm]
