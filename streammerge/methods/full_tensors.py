"""The parts of an adapter that are values, not factors: replaced parameters, trained heads, token rows.

`modules_to_save`, saved embeddings and `bias="all"` replace a parameter of the base; a head that the base does not
have becomes a new tensor; `trainable_token_indices` replace rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from streammerge.core.errors import (
    BaseMismatchError,
    CompositionError,
    ConfigContradictionError,
    ShapeMismatchError,
    UnmatchedKey,
)
from streammerge.core.lines import Lines
from streammerge.core.tensors import FactorView, Operation, TensorInfo
from streammerge.methods.fields import Common
from streammerge.methods.parts import FullTensor, Parts
from streammerge.methods.placing import parameter_place, placed
from streammerge.methods.reading import AdapterInput, Contribution, FullReplacement
from streammerge.names.pieces import Parameter
from streammerge.names.resolve import Found, Missing, Wanted

TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Heads that PEFT adds to `modules_to_save` by itself (PEFT 0.21.2, `peft_model.py`)."""
VALUE_HEADS = frozenset({"v_head", "value_head"})
"""Heads of reinforcement learning that no merged checkpoint has a place for (TRL: `v_head`)."""


def resolve_full_tensors(parts: Parts, config: Common) -> list[Wanted]:
    """What the replacements, then the token rows, of an adapter ask the base for; new heads among them."""
    replaced = [
        Wanted(part.key.module, (part.key.slot,), _same_shape(part.info), part.info.shape)
        for part in parts.replacements
    ]
    return [*replaced, *(Wanted(part.key.module, ("weight",), _same_width(part.info)) for part in parts.tokens)]


def _same_shape(part: TensorInfo) -> Callable[[Parameter], bool]:
    return lambda parameter: parameter.shape == part.shape


def _same_width(part: TensorInfo) -> Callable[[Parameter], bool]:
    return lambda parameter: len(parameter.shape) == 2 and parameter.shape[1] == part.shape[-1]


def read_full_tensors(
    adapter: AdapterInput, config: Common, answers: Sequence[Found | Missing], contribution: Contribution
) -> None:
    """Add the replacements and token rows to the contribution; `answers` belong to `resolve_full_tensors`."""
    parts = [*adapter.parts.replacements, *adapter.parts.tokens]
    for part, answer in zip(parts, answers, strict=True):
        if part in adapter.parts.tokens:
            _read_tokens(part, answer, adapter, config, contribution)
        else:
            _read_replacement(part, answer, adapter, config, contribution)


def _read_replacement(
    part: FullTensor, answer: Found | Missing, adapter: AdapterInput, config: Common, contribution: Contribution
) -> None:
    if isinstance(answer, Found):
        stored, parameter = answer.target.tensor, answer.target.name
        if stored is None:
            contribution.operations += _new_values(part, answer, adapter.number)
        else:
            contribution.replacements.append(FullReplacement(stored, part, answer.rule, False, parameter))
    elif _is_new_head(part, config):
        contribution.replacements.append(FullReplacement(part.name, part, "new-head", True, part.name))
        contribution.notes.append(f"`{part.name}` is not in the base and is written as a new tensor")
    else:
        contribution.unmatched.append(UnmatchedKey(part.key.key, answer.tried, answer.nearest))
        return
    if adapter.weight != 1:
        raise CompositionError(
            (part.key.key,), f"a replaced parameter has no weighted form; its `--weight` is {adapter.weight:g}"
        )


def _new_values(part: FullTensor, answer: Found, number: int) -> Iterator[Operation]:
    """A replaced parameter on the tensors that it is stored in parts of."""
    target, info = answer.target, part.info
    if info.shape != target.shape:
        reason = (
            f"`{part.name}` has shape {list(info.shape)}, `{target.name}` in the base has shape {list(target.shape)}"
        )
        raise ShapeMismatchError((part.key.key,), reason, "is this the base the adapter was trained on?")
    stacked = any(axis.of is None for piece in target.pieces for axis in piece.axes[:1]) and len(info.shape) == 3
    for matrix in range(info.shape[0] if stacked else 1):
        place = parameter_place(target, matrix if stacked else None)
        rows, cols = place.view.shape
        axes = Lines(matrix * rows * cols, rows, cols), Lines(0, cols)
        values = {"values": FactorView(number, info.name, info.dtype, info.count, axes)}
        operation = Operation("values", place, number, part.key.module, answer.rule, values)
        yield from placed([operation], target, stacked=stacked)


def _is_new_head(part: FullTensor, config: Common) -> bool:
    """Whether PEFT would have created this module: named in `modules_to_save`, or by the task type."""
    heads = (*config.modules_to_save, *TASK_HEADS.get(config.task_type, ()))
    path = f".{part.key.module}."
    return any(f".{head}." in path for head in heads)


def _read_tokens(
    part: FullTensor,
    answer: Found | Missing,
    adapter: AdapterInput,
    config: Common,
    contribution: Contribution,
) -> None:
    if isinstance(answer, Missing):
        contribution.unmatched.append(UnmatchedKey(part.key.key, answer.tried, answer.nearest))
        return
    indices = _indices_for(part, config)
    target = answer.target
    resized = next((other for other in contribution.replacements if other.tensor == target.tensor), None)
    if resized:
        target = Parameter.stored_as(replace(resized.part.info, name=resized.tensor))
    if len(part.info.shape) != 2 or part.info.shape[0] != len(indices):
        reason = f"`{part.key.key}` has shape {list(part.info.shape)}, the config lists {len(indices)} token indices"
        raise ConfigContradictionError((part.key.key,), reason)
    stored = f"`{target.name}` in the base has"
    if len(target.shape) != 2 or target.shape[1] != part.info.shape[1]:
        reason = f"the token rows have width {part.info.shape[1]:,}, {stored} shape {list(target.shape)}"
        raise ShapeMismatchError((part.key.key,), reason)
    if max(indices) >= target.shape[0]:
        reason = f"the adapter trains token {max(indices):,}, {stored} {target.shape[0]:,} rows"
        raise BaseMismatchError(
            (part.key.key,), reason, "the base's embeddings were resized for training: merge into that base"
        )
    if adapter.weight != 1:
        raise CompositionError(
            (part.key.key,), f"trained token rows have no weighted form; their `--weight` is {adapter.weight:g}"
        )
    rows = {"rows": FactorView.matrix(adapter.number, part.info, *part.info.shape)}
    place = parameter_place(target)
    number, module = adapter.number, part.key.module
    operation = Operation("token_rows", place, number, module, answer.rule, rows, indices=indices)
    contribution.operations += placed([operation], target)


def _indices_for(part: FullTensor, config: Common) -> tuple[int, ...]:
    """The rows one file tensor stands for: a list is about the input embedding, an object names modules by suffix."""
    if isinstance(config.token_indices, tuple):
        found = config.token_indices
    else:
        module = part.key.module
        found = next(
            (rows for name, rows in config.token_indices.items() if module == name or module.endswith(f".{name}")), ()
        )
    if not found:
        raise ConfigContradictionError((part.key.key,), f"the config lists no token indices for `{part.key.module}`")
    return found
