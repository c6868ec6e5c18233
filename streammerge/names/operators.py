"""The operators with which transformers turns stored tensors into parameters, done to pieces instead of values.

Each takes tensors by the pattern they matched and gives tensors by pattern, as its namesake in transformers'
`core_model_loading.py` does to torch tensors (checked against 5.23). The invariant: no element is lost or doubled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from streammerge.core.lines import Lines, Pairing, pairings
from streammerge.names.pieces import Axis, Piece
from streammerge.names.sizes import evaluate


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor on its way from disk to model: its shape so far, and where it lies."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """What operators need to know beside the tensors: a transform's patterns, and the config of the model."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    config: Mapping[str, Any]


Parts = dict[str, list[Part]]
Operator = Callable[[Parts, Setting, Mapping[str, Any]], Parts]


def apply_operators(parts: Parts, steps: Sequence[tuple[str, Mapping[str, Any]]], setting: Setting) -> dict[str, Part]:
    """Parts by target pattern, after all steps. Raises ValueError where the tensors are not what an operator takes."""
    for name, arguments in steps:
        parts = OPERATORS[name](parts, setting, arguments)
    return {pattern: _single(found) for pattern, found in parts.items()}


def _merge_modulelist(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    target = setting.targets[0] if len(parts) == 1 else None
    return {target or pattern: [_stacked(found)] for pattern, found in parts.items()}


def _concatenate(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    ordered = [part for pattern in setting.sources for part in parts.get(pattern, [])]
    return {setting.targets[0]: [_joined(ordered, arguments.get("dim", 0))]}


def _chunk(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    part, axis = _only(parts), arguments.get("dim", 0)
    size = -(-part.shape[axis] // len(setting.targets))
    bounds = [(n * size, min((n + 1) * size, part.shape[axis])) for n in range(len(setting.targets))]
    return {target: [_taken(part, axis, *bound)] for target, bound in zip(setting.targets, bounds, strict=True)}


def _split(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    part, axis = _only(parts), arguments.get("dim", 0)
    sizes = [evaluate(size, setting.config) or 0 for size in arguments["sizes"]]
    if min(sizes) < 1 or sum(sizes) != part.shape[axis]:
        raise ValueError(f"{part.shape[axis]} lines cannot be split into {sizes}")
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return {
        target: [_taken(part, axis, end - size, end)]
        for target, size, end in zip(setting.targets, sizes, ends, strict=True)
    }


def _transpose(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    part, target = _only(parts), setting.targets[0] if len(setting.targets) == 1 else setting.sources[0]
    first, second = arguments.get("dim0", 0), arguments.get("dim1", 1)
    if "rows" in arguments:
        # Stored either way round in the field: only what does not have the model's shape is turned.
        expected = evaluate(arguments["rows"], setting.config)
        if expected not in (part.shape[first], part.shape[second]):
            raise ValueError(f"{part.shape} has no axis of {expected}")
        if expected == part.shape[first]:
            return {target: [part]}
    order = list(range(len(part.shape)))
    order[first], order[second] = second, first
    pieces = tuple(replace(piece, axes=tuple(piece.axes[n] for n in order)) for piece in part.pieces)
    return {target: [Part(tuple(part.shape[n] for n in order), pieces)]}


def _interleave(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    part, axis = _only(parts), arguments.get("dim", 0)
    folds = (2, part.shape[axis] // 2) if arguments.get("inverse") else (part.shape[axis] // 2, 2)
    return {setting.targets[0]: [_permuted(part, axis, (1, *folds))]}


def _permute_for_rope(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    inner = setting.config.get(arguments.get("subconfig_key") or "", setting.config)
    heads = inner.get("num_attention_heads") if isinstance(inner, Mapping) else None
    if type(heads) is not int or heads < 1:
        raise ValueError("the config does not say how many heads there are")
    chosen = arguments.get("permute_layer_names")
    several = (len(setting.targets) > 1) != (len(setting.sources) > 1)
    found: Parts = {}
    for pattern, (part,) in parts.items():
        half = part.shape[0] // heads // 2
        turned = chosen is None or any(name in pattern for name in chosen)
        folds = (2, half) if arguments.get("inverse") else (half, 2)
        found[pattern if several else setting.targets[0]] = [_permuted(part, 0, (heads, *folds)) if turned else part]
    return found


def _ernie_experts(parts: Parts, setting: Setting, arguments: Mapping[str, Any]) -> Parts:
    """Text experts first, then those for images: a list by halves, each stacked, and their kinds joined."""
    found: Parts = {}
    for number, target in enumerate(setting.targets):
        kinds = []
        for pattern in setting.sources:
            size = -(-len(parts[pattern]) // len(setting.targets))
            kinds.append(_stacked(parts[pattern][number * size : (number + 1) * size]))
        found[target] = [_joined(kinds, arguments.get("concat_dim", 1))]
    return found


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        "MergeModulelist": _merge_modulelist,
        "Concatenate": _concatenate,
        "Chunk": _chunk,
        "Split": _split,
        "Transpose": _transpose,
        "Interleave": _interleave,
        "PermuteForRope": _permute_for_rope,
        "ErnieFuseAndSplitTextVisionExperts": _ernie_experts,
    }
)


# --- one tensor or several -----------------------------------------------------------------------------------------
def _single(found: list[Part]) -> Part:
    if len(found) != 1:
        raise ValueError(f"{len(found)} tensors where one belongs")
    return found[0]


def _only(parts: Parts) -> Part:
    return _single([part for found in parts.values() for part in found])


def _stacked(parts: list[Part]) -> Part:
    if len({part.shape for part in parts}) != 1:
        raise ValueError("experts of different shapes")
    pieces = [
        Piece(piece.tensor, piece.shape, (Axis(None, Lines(number, 1), Lines(0, 1)), *piece.axes), piece.fixed)
        for number, part in enumerate(parts)
        for piece in part.pieces
    ]
    return Part((len(parts), *parts[0].shape), tuple(pieces))


def _joined(parts: list[Part], axis: int) -> Part:
    rest = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
    if len(rest) != 1:
        raise ValueError("tensors of different shapes are joined")
    pieces, at = [], 0
    for part in parts:
        pieces += [_with_axis(piece, axis, here=piece.axes[axis].here.shifted(at)) for piece in part.pieces]
        at += part.shape[axis]
    return Part((*parts[0].shape[:axis], at, *parts[0].shape[axis + 1 :]), tuple(pieces))


def _taken(part: Part, axis: int, first: int, last: int) -> Part:
    """Lines [first, last) of an axis."""
    pieces = [
        _with_axis(piece, axis, here=here, there=there)
        for piece in part.pieces
        for here, there in _within(piece.axes[axis].here, piece.axes[axis].there, first, last)
    ]
    return Part((*part.shape[:axis], last - first, *part.shape[axis + 1 :]), tuple(pieces))


def _permuted(part: Part, axis: int, folds: tuple[int, int, int]) -> Part:
    """The axis folded into (heads, a, b), of which the last two change places."""
    if math.prod(folds) != part.shape[axis]:
        raise ValueError(f"{part.shape[axis]} lines do not fold into {folds}")
    pieces = [
        _with_axis(piece, axis, here=here, there=there)
        for piece in part.pieces
        for here, there in _turned(piece.axes[axis].here, piece.axes[axis].there, folds)
    ]
    return Part(part.shape, tuple(pieces))


def _with_axis(piece: Piece, number: int, *, here: Lines, there: Lines | None = None) -> Piece:
    axis = piece.axes[number]
    changed = Axis(axis.of, here, there or axis.there)
    axes = (*piece.axes[:number], changed, *piece.axes[number + 1 :])
    return Piece(piece.tensor, piece.shape, axes, piece.fixed)


@functools.lru_cache(maxsize=4096)
def _within(here: Lines, there: Lines, first: int, last: int) -> tuple[Pairing, ...]:
    if here.count == there.count == here.step == there.step == 1:
        start, end = max(first, here.start), min(last, here.end)
        moved = there.start + start - here.start
        return ((Lines(start - first, end - start), Lines(moved, end - start)),) if start < end else ()
    ours, theirs = here.array(), there.array()
    kept = (ours >= first) & (ours < last)
    return tuple(pairings(ours[kept] - first, theirs[kept]))


@functools.lru_cache(maxsize=4096)
def _turned(here: Lines, there: Lines, folds: tuple[int, int, int]) -> tuple[Pairing, ...]:
    import numpy as np

    sources = np.arange(math.prod(folds)).reshape(folds).swapaxes(1, 2).reshape(-1)
    places = np.empty_like(sources)
    places[sources] = np.arange(len(sources))
    return tuple(pairings(places[here.array()], there.array()))
