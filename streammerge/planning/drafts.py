"""Recipes in the making: what all adapters together do to each tensor of the output.

Between reading the adapters and fixing the plan, effects are collected by output name, so that ties, composition and
the ledger can look at them. A draft may stand under a name that the base does not have: the absent side of a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from streammerge.core.errors import CompositionError, ShapeMismatchError
from streammerge.core.tensors import BASE, Operation, Replacement, TensorInfo
from streammerge.methods import FORMULAS
from streammerge.methods.reading import Contribution, FullReplacement

EMBEDDING_MODULES = frozenset(
    {"embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "lm_head", "embed_out", "tok_embeddings", "output"}
)
"""Last module segments of tables with one row for each token, whose row count an adapter may change."""


TURN = {"values": 0, "token_rows": 2}
"""Formulas that come before or after the others."""


@dataclass(slots=True)
class Draft:
    """All effects on one output tensor. `replaced_by` is the number of the adapter that replaces it."""

    replacement: FullReplacement | None = None
    replaced_by: int = 0
    operations: list[Operation] = field(default_factory=list)

    @property
    def tokens(self) -> list[Operation]:
        """The operations that replace rows."""
        return [operation for operation in self.operations if operation.formula == "token_rows"]

    @property
    def others(self) -> list[Operation]:
        """The operations that do not."""
        return [operation for operation in self.operations if operation.formula != "token_rows"]

    def source(self, replacement: FullReplacement) -> Replacement:
        """What the output tensor is made of: the adapter's tensor that replaces it."""
        part, rule = replacement.part, replacement.rule
        return Replacement(self.replaced_by, part.key.key, part.name, rule, replacement.parameter)

    def used(self) -> set[tuple[int, str]]:
        """The adapter tensors this draft uses, as (adapter, key)."""
        used = {(view.adapter, view.key) for operation in self.operations for view in operation.factors.values()}
        return used | ({(self.replaced_by, self.replacement.part.key.key)} if self.replacement else set())


def collect(contributions: Sequence[Contribution]) -> dict[str, Draft]:
    """Drafts by output name, replacements first, new values of a part likewise, then operations in the order of the
    adapters, then token rows."""
    drafts: dict[str, Draft] = {}
    for number, contribution in enumerate(contributions):
        for replacement in contribution.replacements:
            draft = drafts.setdefault(replacement.tensor, Draft())
            if draft.replacement:
                both = (draft.replacement.part.key.key, replacement.part.key.key)
                raise CompositionError(
                    both,
                    f"two adapters replace `{replacement.tensor}`",
                    "merge them one at a time, in the order you mean",
                )
            draft.replacement, draft.replaced_by = replacement, number
        for operation in contribution.operations:
            drafts.setdefault(operation.place.tensor, Draft()).operations.append(operation)
    for name, draft in drafts.items():
        draft.operations.sort(key=lambda operation: TURN.get(operation.formula, 1))
        check_composition(name, draft)
        _check_sources(draft, drafts)
    return drafts


def _check_sources(draft: Draft, drafts: Mapping[str, Draft]) -> None:
    """Refuse an effect that reads a tensor of the base which another adapter replaces."""
    for operation in draft.operations:
        for view in operation.factors.values():
            if view.adapter == BASE and view.key in drafts and drafts[view.key].replacement:
                reason = f"`{operation.module}` is adapted by what the base has in `{view.key}`, which another replaces"
                raise CompositionError((operation.module,), reason, "merge them one at a time, in the order you mean")


def check_composition(name: str, draft: Draft) -> None:
    """Refuse effects on one tensor that have no agreed sum: a formula that looks at W stands alone in its adapter, and
    the same row is replaced once."""
    looking = [op for op in draft.others if not FORMULAS[op.formula].additive and op.formula != "values"]
    if all(FORMULAS[op.formula].commutes for op in looking) and len({op.formula for op in draft.others}) == 1:
        looking = []
    adapters = {op.adapter for op in draft.others}
    if looking and len(adapters) > 1:
        title = FORMULAS[looking[0].formula].title
        reason = f"several adapters change `{name}`, and one of them by `{title}`, which has no agreed sum with others"
        raise CompositionError(
            tuple(dict.fromkeys(op.module for op in looking)), reason, "merge them one at a time, in the order you mean"
        )
    replacing = {op.adapter for op in draft.others if op.formula == "values"}
    if len(replacing) > 1:
        modules = tuple(dict.fromkeys(op.module for op in draft.others if op.formula == "values"))
        advice = "merge them one at a time, in the order you mean"
        raise CompositionError(modules, f"two adapters replace parts of `{name}`", advice)
    rows = [row for op in draft.tokens for row in op.indices]
    if len(set(rows)) != len(rows):
        row = next(row for row in rows if rows.count(row) > 1)
        raise CompositionError(
            (name,), f"two adapters replace row {row:,} of `{name}`", "merge them one at a time, in the order you mean"
        )


def new_shape(name: str, draft: Draft, info: TensorInfo | None) -> tuple[int, ...]:
    """The output's shape of a replaced tensor. Only a table with one row for each token may change its rows.

    Raises ShapeMismatchError.
    """
    part = draft.replacement.part.info if draft.replacement else None
    if part is None or info is None or part.shape == info.shape:
        return part.shape if part else info.shape  # type: ignore[union-attr]
    module = name.split(".")[-2] if "." in name else ""
    if module in EMBEDDING_MODULES and len(info.shape) == 2 == len(part.shape) and part.shape[1] == info.shape[1]:
        if draft.others or draft.tokens:
            _check_places(name, draft, part.shape)
        return part.shape
    reason = f"`{part.name}` has shape {list(part.shape)}, `{name}` in the base has shape {list(info.shape)}"
    raise ShapeMismatchError((part.name,), reason, "is this the base the adapter was trained on?")


def _check_places(name: str, draft: Draft, shape: tuple[int, ...]) -> None:
    for operation in draft.operations:
        if (operation.place.view.rows, operation.place.view.cols) != shape:
            adapted = f"module `{operation.module}` was adapted at {operation.place.view.rows:,} rows"
            reason = f"{adapted}, the adapter's own `{name}` has {shape[0]:,}"
            raise ShapeMismatchError((operation.module,), reason)


def changed_rows(drafts: Mapping[str, Draft], tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Tables whose row count changes: name to (old, new)."""
    return {
        name: (tensors[name].shape[0], draft.replacement.part.info.shape[0])
        for name, draft in drafts.items()
        if draft.replacement and name in tensors and draft.replacement.part.info.shape != tensors[name].shape
    }
