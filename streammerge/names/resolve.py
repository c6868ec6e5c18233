"""From the module paths of an adapter to tensor names of the base: four rules, tried in order, each recorded.

`exact`: the name is there. `base-prefix`: it is there with the class's base-model prefix added or removed, as for an
adapter trained on the headless class. `tied-alias`: the name is absent because it is tied to one that is there.
`prefix-solver`: one single exchange of leading segments maps everything that is left onto tensors of the right shape,
and no other exchange does. Names only; what the shapes and values of a match mean is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streammerge.core.tensors import TensorInfo
from streammerge.core.text import nearest
from streammerge.names.architectures import Architecture

PREFIX_SEGMENTS = frozenset(
    {
        "model",
        "language_model",
        "text_model",
        "transformer",
        "backbone",
        "decoder",
        "encoder",
        "thinker",
        "base_model",
        "bert",
        "roberta",
    }
)
"""Segments that wrappers add in front of a sub-model; the solver exchanges nothing else."""


EXPLAINED = 64
"""Misses for which the nearest names are looked up: each compares with every name of the base."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor an adapter module asks for: any of `parameters` under `module`. `fits` says whether a tensor's shape
    would do; only the prefix solver asks."""

    module: str
    parameters: tuple[str, ...]
    fits: Callable[[TensorInfo], bool]

    def names(self, module: str | None = None) -> tuple[str, ...]:
        """The tensor names to look for, under this module or another in its stead."""
        path = self.module if module is None else module
        return tuple(f"{path}.{parameter}" if path else parameter for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class Found:
    """The tensor a wish resolves to, and by which rule. `alias` is the name that was meant, where it is absent from the
    base because it is tied to `tensor`."""

    tensor: str
    rule: str
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """What was tried, as `name (rule)`, and what looks like it."""

    tried: tuple[str, ...]
    nearest: tuple[str, ...]


class Resolver:
    """Looks names up in one base; `architecture` is None for a class that is not in the table."""

    def __init__(self, base: Mapping[str, TensorInfo], architecture: Architecture | None) -> None:
        self.base = base
        self.prefix = architecture.base_prefix if architecture else ""
        self.ties = _tied_neighbours(architecture.tied if architecture else {})
        self._explained = 0

    def resolve(self, wishes: Sequence[Wanted]) -> list[Found | Missing]:
        """One answer for each wish, in order."""
        answers: list[Found | None] = [self._by_rules(wish) for wish in wishes]
        left = [wish for wish, answer in zip(wishes, answers, strict=True) if answer is None]
        taken = {answer.tensor for answer in answers if answer}
        solved = solve_prefix(left, self.base, taken) if left else {}
        return [
            answer or solved.get(wish.names()) or self._missing(wish)
            for wish, answer in zip(wishes, answers, strict=True)
        ]

    def find(self, name: str) -> Found | None:
        """A full tensor name by the first three rules."""
        for candidate, rule, alias in self._candidates(name):
            if candidate in self.base:
                return Found(candidate, rule, alias)
        return None

    def _by_rules(self, wish: Wanted) -> Found | None:
        return next((found for name in wish.names() if (found := self.find(name))), None)

    def _candidates(self, name: str) -> Iterable[tuple[str, str, str | None]]:
        """Names to look for, the rule each comes from, and the absent alias it would stand for."""
        yield name, "exact", None
        spellings = [name, *self._prefix_variants(name)]
        for variant in spellings[1:]:
            yield variant, "base-prefix", None
        for spelling in spellings:
            for partner in self.ties.get(spelling, ()):
                yield partner, "tied-alias", spelling
                for variant in self._prefix_variants(partner):
                    yield variant, "tied-alias", spelling

    def _prefix_variants(self, name: str) -> tuple[str, ...]:
        if not self.prefix:
            return ()
        inner = name.removeprefix(f"{self.prefix}.")
        return (inner,) if inner != name else (f"{self.prefix}.{name}",)

    def _missing(self, wish: Wanted) -> Missing:
        tried = tuple(
            dict.fromkeys(f"{name} ({rule})" for full in wish.names() for name, rule, _ in self._candidates(full))
        )
        alike = nearest(wish.names()[0], tuple(self.base), 2) if self._explained < EXPLAINED else ()
        self._explained += 1
        return Missing(tried[:4], alike)


def solve_prefix(
    wishes: Sequence[Wanted], base: Mapping[str, TensorInfo], taken: set[str]
) -> dict[tuple[str, ...], Found]:
    """The one exchange of leading segments that maps every wish onto its own free tensor of a fitting shape; empty if
    there is none, or more than one. Keys are the wishes' names."""
    solutions: dict[tuple[str, ...], str] = {}
    for strip, add in _exchanges(wishes[0], base):
        mapping = _exchange(wishes, strip, add, base, taken)
        if mapping:
            solutions[mapping] = f"prefix-solver: `{'.'.join(strip)}` -> `{'.'.join(add)}`"
    if len(solutions) != 1:
        return {}
    ((targets, rule),) = solutions.items()
    return {wish.names(): Found(target, rule) for wish, target in zip(wishes, targets, strict=True)}


def _exchanges(wish: Wanted, base: Mapping[str, TensorInfo]) -> Iterable[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every exchange that the base's names suggest for one wish."""
    segments = tuple(wish.module.split("."))
    for count in range(min(4, len(segments))):
        strip = segments[:count]
        if not PREFIX_SEGMENTS.issuperset(strip):
            return
        for tail in wish.names(".".join(segments[count:])):
            for name in base:
                if name == tail or name.endswith(f".{tail}"):
                    add = tuple(name.split(".")[: -len(tail.split("."))])
                    if len(add) <= 4 and PREFIX_SEGMENTS.issuperset(add) and add != strip:
                        yield strip, add


def _exchange(
    wishes: Sequence[Wanted],
    strip: tuple[str, ...],
    add: tuple[str, ...],
    base: Mapping[str, TensorInfo],
    taken: set[str],
) -> tuple[str, ...] | None:
    targets: list[str] = []
    for wish in wishes:
        segments = tuple(wish.module.split("."))
        if segments[: len(strip)] != strip:
            return None
        names = wish.names(".".join((*add, *segments[len(strip) :])))
        target = next((name for name in names if name in base and wish.fits(base[name])), None)
        if target is None or target in taken:
            return None
        targets.append(target)
    return tuple(targets) if _all_different(targets) else None


def _all_different(items: list[str]) -> bool:
    return all(a != b for a, b in pairwise(sorted(items)))


def _tied_neighbours(tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Every tied name with the others of its group, the shared source first."""
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    return {name: tuple(other for other in group if other != name) for group in groups.values() for name in group}
