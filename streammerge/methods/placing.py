"""From what an adapter means to where that is stored: operations on a model's parameter become operations on tensors.

Readers of adapters speak of parameters as the model has them, whole; here each is cut along the pieces in which it is
stored. The invariant: the parts of one operation cover its parameter's matrix, each element once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streammerge.core.errors import NotMergeableError
from streammerge.core.lines import all_lines
from streammerge.core.tensors import MatrixView, Operation, Place
from streammerge.methods import FORMULAS
from streammerge.names.pieces import Parameter


def parameter_place(parameter: Parameter, expert: int | None = None, *, transposed: bool = False) -> Place:
    """All of a parameter as one matrix, or one expert's matrix of a stack, in the model's own orientation."""
    view = MatrixView.of(parameter.shape, stacked=expert is not None)
    return Place(parameter.name, view, expert or 0, all_lines(view.rows), all_lines(view.cols), transposed)


def placed(operations: Iterable[Operation], parameter: Parameter, *, stacked: bool = False) -> Iterator[Operation]:
    """`operations`, whose places are matrices of the one `parameter`, on the tensors that this is stored in; `stacked`
    for experts.

    Raises NotMergeableError where an operation cannot follow the way in which the parameter is stored.
    """
    if not parameter.complete:
        raise NotMergeableError((parameter.name,), f"of `{parameter.name}` only a part is stored in the base")
    try:
        cuts = parameter.cuts(stacked=stacked)
    except ValueError as error:
        reason = f"`{parameter.name}` is stored in a way that is not supported: {error}"
        raise NotMergeableError((parameter.name,), reason) from None
    for operation in operations:
        parts = cuts[operation.place.matrix]
        for cut in parts:
            formula = FORMULAS[operation.formula]
            place, factors = formula.cut(operation, cut)
            lines = (cut.cols, cut.rows) if operation.place.transposed else (cut.rows, cut.cols)
            is_part = len(parts) > 1 or place.shape != place.view.shape
            yield Operation(  # not `replace`, which experts by the ten thousand would feel
                operation.formula,
                place,
                operation.adapter,
                operation.module,
                operation.rule,
                factors,
                operation.numbers,
                operation.indices,
                operation.rounding,
                parameter.name,
                is_part,
                lines if formula.windowed else None,
            )
