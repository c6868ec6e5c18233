"""Plans and adapters as text for people, within 80 columns where names allow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby

from streammerge.cli.output import table
from streammerge.cli.regions import targets_text
from streammerge.core import io
from streammerge.core.errors import UnmatchedKeysError
from streammerge.core.tensors import OutputTensor, Replacement
from streammerge.core.text import count_text, printable, size_text
from streammerge.inspection import AdapterStatus, ModuleStatus
from streammerge.methods import FORMULAS
from streammerge.planning.adapted import AdaptedModule, adapted_modules, output_files, rules_summary
from streammerge.planning.model import MergePlan
from streammerge.planning.sidecars import NO_CODE
from streammerge.progress import duration_text

SHOWN = 12
ASSUMED_RATE = 400e6
"""Bytes read and written per second for the time figure: a modest disk doing both at once."""


def plan_text(plan: MergePlan, output: str | None, *, verbose: bool) -> str:
    """What a run would do and take."""
    figures = plan.figures
    files, workers = count_text(len(plan.base.files), "file"), count_text(figures.workers, "worker")
    modules = adapted_modules(plan, output_files(plan))
    lines = [
        f"base      {printable(plan.base.identity)}, {files}, {size_text(figures.read)}",
        *(
            f"adapter   {printable(item.identity)}, weight {item.weight:g}, digest {item.digest[:12]}"
            for item in plan.adapters
        ),
        f"output    {count_text(len(plan.shards), 'file')}, {size_text(figures.write)}{_free(output)}",
        f"changed   {_changed(plan)}",
        *(f"          {line}" for line in _formulas(plan)),
        f"names     {_names(module.rules for module in modules)}",
        f"memory    {size_text(figures.memory)} for {workers}, beside the imported libraries",
        f"time      about {duration_text(figures.write / ASSUMED_RATE)} at {size_text(ASSUMED_RATE)}/s",
    ]
    lines += [f"config    {printable('.'.join(path))} = {value!r}" for path, value in plan.config_edits]
    lines += [f"ignored   {printable(key)} ({rule})" for item in plan.adapters for key, rule in item.ignored.items()]
    lines += [f"code      {printable(name)} is copied; loaders may run it" for name in plan.code]
    lines += [f"code      {printable(name)} is left out" for name, rule in plan.left_out if rule == NO_CODE]
    lines += [f"note      {printable(note)}" for note in plan.notes]
    lines += ["", _tensor_table(plan, None if verbose else SHOWN)]
    for module in modules if verbose else ():
        words = [f"rank {module.rank}"] if module.rank is not None else []
        words += [_delta_text(module.norm, " + ".join(module.formulas), zero=module.zero)]
        lines += ["", *_placed_lines(module, words, every=True)]
    return "\n".join(lines)


def status_text(status: AdapterStatus, *, verbose: bool) -> str:
    """The modules of an adapter: as a table, or with a base each with where it goes; then what has no place there."""
    tensors, modules = count_text(status.tensors, "tensor"), count_text(len(status.modules), "module")
    head = f"{printable(status.peft_type)} adapter, {tensors}, {modules}"
    zero = [module for module in status.modules if module.zero]
    if zero:
        head += f", {len(zero)} without effect (B = 0)"
    lines = [head]
    placed = [module.rules for module in status.modules if module.targets]
    if placed:
        lines.append(f"names found: {_names(placed)}")
    if status.siblings:
        lines.append(f"other adapters in subfolders: {', '.join(map(printable, status.siblings))}")
    lines += [f"note: {printable(note)}" for note in status.notes]
    if placed:
        for module in status.modules:
            lines += ["", *_status_lines(module, verbose=verbose)]
    elif status.modules:
        lines += ["", _factor_table(status.modules, None if verbose else SHOWN)]
    return "\n".join([*lines, *_without_target(status)])


def _factor_table(modules: Sequence[ModuleStatus], limit: int | None) -> str:
    header = ["module", "rank", "alpha", "scaling", "norm of delta"]
    text = table(header, [[module.module, *_figures(module)] for module in modules[:limit]], right=(1, 2, 3, 4))
    more = len(modules) - len(modules[:limit])
    return f"{text}\n... {more} more, all of them with -v" if more else text


def _figures(module: ModuleStatus) -> list[str]:
    norm = "zero" if module.zero else f"{module.norm:.4g}" if module.norm is not None else module.kind
    return [_number(module.rank), _number(module.alpha), _number(module.scaling), norm]


def _status_lines(module: ModuleStatus, *, verbose: bool) -> list[str]:
    """A module and where it goes, or why it has no place."""
    names = ("rank", "alpha", "scaling")
    told = [(name, getattr(module, name)) for name in names if getattr(module, name) is not None]
    words = [f"{name} {_number(value)}" for name, value in told]
    words.append(_delta_text(module.norm, module.kind, zero=module.zero))
    if module.targets:
        return _placed_lines(module, words, every=verbose)
    return [f"{printable(module.module)}: {', '.join(words)}", f"  !!  {printable(module.problem or 'not looked for')}"]


def _delta_text(norm: float | None, kind: str, *, zero: bool) -> str:
    if zero:
        return "no effect (B = 0)"
    return kind.replace("_", " ") if norm is None else f"norm of delta {norm:.4g}"


def _placed_lines(module: ModuleStatus | AdaptedModule, words: Sequence[str], *, every: bool) -> list[str]:
    """A module: its figures, its parameter and the rules that found it, the places that change."""
    name = module.canonical if isinstance(module, ModuleStatus) else module.parameter
    return [
        f"{printable(module.module)}: {', '.join(words)}",
        f"  is  {printable(name)} ({printable('; '.join(module.rules))})",
        *(f"  ->  {line}" for line in targets_text(module.targets, every=every)),
    ]


def _without_target(status: AdapterStatus) -> list[str]:
    """Every adapter key that the base has no tensor for, what was tried and what looks like it; keys with the same
    answer together, as the two factors of a module."""
    lines: list[str] = []
    missing = [item for error in status.refusals if isinstance(error, UnmatchedKeysError) for item in error.unmatched]
    for (tried, near), items in groupby(missing, key=lambda item: (item.tried, item.nearest)):
        lines += [f"  {printable(item.key)}" for item in items]
        lines += [f"    tried    {printable(name)}" for name in tried]
        lines += [f"    nearest  {printable(name)}" for name in near]
    return ["", "keys without a tensor in the base:", *lines] if lines else []


def _names(modules: Iterable[tuple[str, ...]]) -> str:
    listed = list(modules)
    return f"{count_text(len(listed), 'module')}: {printable(rules_summary(listed))}"


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
        additive = all(FORMULAS[operation.formula].additive for operation in tensor.operations)
        norm = "told by the run" if additive else "depends on W"
    else:
        norm = f"{sum(n * n for n in norms if n) ** 0.5:.4g}"
    shape = "x".join(map(str, tensor.shape))
    return [tensor.name, shape, tensor.dtype, "/".join(map(str, sorted(ranks))) or "-", norm]
