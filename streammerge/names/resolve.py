"""From the module paths of an adapter to parameters of the base: rules, tried in order, each recorded.

`exact`: the model, or the checkpoint, has the name. `base-prefix`: it does with the class's base-model prefix added or
removed, as for an adapter trained on the headless class. `converted`: the rules of the table lead from the name to what
is stored, as for an adapter of an older transformers. `tied-alias`: the name is absent because it is tied to one that
is there. `fused` and `split`: it is a part of what is stored, or made of parts that are. `prefix-solver`: one single
exchange of leading segments maps everything that is left onto parameters of the right shape, and no other does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from streammerge.core.text import nearest
from streammerge.names.catalog import Catalog
from streammerge.names.fused import Fused
from streammerge.names.pieces import Parameter, Sizes

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
SUGGESTING = 8
"""Wishes of which the first that any name of the base ends like suggests the exchanges to try."""
EXPLAINED = 64
"""Misses for which the nearest names are looked up: each compares with every name of the base."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A parameter an adapter module asks for: any of `parameters` under `module`. `shape` is that of the module's
    weight, (out, in), as far as the factors tell. `fits` says whether a parameter would do; only the prefix solver
    asks."""

    module: str
    parameters: tuple[str, ...]
    fits: Callable[[Parameter], bool]
    shape: Sizes | None = None

    def names(self, module: str | None = None) -> tuple[str, ...]:
        """The names to look for, under this module or another in its stead."""
        path = self.module if module is None else module
        return tuple(f"{path}.{parameter}" if path else parameter for parameter in self.parameters)


@dataclass(frozen=True, slots=True)
class Found:
    """The parameter a wish resolves to, and by which rule. `alias` is the stored name of the tensor that was meant,
    where it is absent from the base because it is tied to this one."""

    parameter: Parameter
    rule: str
    alias: str | None = None

    @property
    def target(self) -> Parameter:
        """The parameter that was meant."""
        return self.parameter.moved(self.alias) if self.alias else self.parameter


@dataclass(frozen=True, slots=True)
class Missing:
    """What was tried, as `name (rule)`, and what looks like it."""

    tried: tuple[str, ...]
    nearest: tuple[str, ...]


class Resolver:
    """Looks names up in the catalog of one base."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.fused = Fused(catalog)
        architecture = catalog.architecture
        self.ties = _tied_neighbours(architecture.tied if architecture else {})
        self._explained = 0

    def resolve(self, wishes: Sequence[Wanted]) -> list[Found | Missing]:
        """One answer for each wish, in order."""
        answers: list[Found | None] = [self._by_rules(wish) for wish in wishes]
        left = [wish for wish, answer in zip(wishes, answers, strict=True) if answer is None]
        taken = {answer.parameter.name for answer in answers if answer}
        solved = solve_prefix(left, self, taken) if left else {}
        return [
            answer or solved.get(wish.names()) or self._missing(wish)
            for wish, answer in zip(wishes, answers, strict=True)
        ]

    def find(self, name: str, shape: Sizes | None = None) -> Found | None:
        """A full parameter name by all rules but the last."""
        return next(self.candidates(name, shape), None)

    def _by_rules(self, wish: Wanted) -> Found | None:
        return next((found for name in wish.names() if (found := self.find(name, wish.shape))), None)

    def candidates(self, name: str, shape: Sizes | None, *, tied: bool = True) -> Iterator[Found]:
        """What the rules find, best first; `tied` for the other sides of ties too."""
        catalog = self.catalog
        known = tuple(size for size in shape or () if size is not None)
        if found := catalog.parameter(name):
            yield Found(found, _said("exact", found))
        if found := catalog.tensor(name):
            yield Found(found, "exact")
        if found := catalog.prefixed(name):
            yield Found(found, _said("base-prefix", found))
        if found := catalog.translated(name, known if shape is not None and len(known) == len(shape) else None):
            yield Found(found, _said("converted", found))
        yield from self._tied(name) if tied else ()
        if shape is not None:
            yield from (Found(found, _said(rule, found)) for found, rule in self.fused.find(name, shape))

    def _tied(self, name: str) -> Iterator[Found]:
        catalog = self.catalog
        meant = catalog.conversions.rewrite(name).name
        for spelling in dict.fromkeys((name, meant, *self._prefix_variants(name), *self._prefix_variants(meant))):
            for partner in self.ties.get(spelling, ()):
                found = catalog.parameter(partner) or catalog.prefixed(partner)
                if found and found.tensor:
                    yield Found(found, _said("tied-alias", found), catalog.spelled(spelling))

    def _prefix_variants(self, name: str) -> tuple[str, ...]:
        prefix = self.catalog.prefix
        if not prefix:
            return ()
        return (name.removeprefix(prefix),) if name.startswith(prefix) else (prefix + name,)

    def _missing(self, wish: Wanted) -> Missing:
        tried: dict[str, None] = {}
        for name in wish.names():
            meant = self.catalog.conversions.rewrite(name)
            tried[f"{name} (exact)"] = None
            tried |= dict.fromkeys(f"{other} (base-prefix)" for other in self._prefix_variants(name))
            if meant.rules:
                tried[f"{meant.name} (converted by {', '.join(meant.rules)})"] = None
            tried |= dict.fromkeys(f"{other} (tied-alias)" for other in self.ties.get(name, ()))
            tried |= dict.fromkeys(self.fused.tried(name))
            if twin := self.catalog.twin(name):
                tried[f"{twin} (the same parameter, stored twice)"] = None
        alike = nearest(wish.names()[0], tuple(self.catalog.names), 2) if self._explained < EXPLAINED else ()
        self._explained += 1
        return Missing(tuple(tried)[:6], alike)


def _said(rule: str, found: Parameter) -> str:
    """The rule, with those of the table that lead from disk to the parameter."""
    return f"{rule}, {' '.join(found.rules)}" if found.rules else rule


def solve_prefix(wishes: Sequence[Wanted], resolver: Resolver, taken: set[str]) -> dict[tuple[str, ...], Found]:
    """The one exchange of leading segments that maps every wish onto its own free parameter of a fitting shape; empty
    if there is none, or more than one. Keys are the wishes' names."""
    solutions: dict[tuple[str, ...], list[Found]] = {}
    names = resolver.catalog.names
    suggested = (list(dict.fromkeys(_exchanges(wish, names))) for wish in wishes[:SUGGESTING])
    for strip, add in next(filter(None, suggested), []):
        mapping = _exchange(wishes, strip, add, resolver, taken)
        if mapping:
            solutions.setdefault(tuple(str(found.parameter.pieces) for found in mapping), mapping)
    if len(solutions) != 1:
        return {}
    (answers,) = solutions.values()
    return {wish.names(): answer for wish, answer in zip(wishes, answers, strict=True)}


def _exchanges(wish: Wanted, names: Iterable[str]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Every exchange that the base's names suggest for one wish."""
    segments = tuple(wish.module.split("."))
    for count in range(min(4, len(segments))):
        strip = segments[:count]
        if not PREFIX_SEGMENTS.issuperset(strip):
            return
        for tail in wish.names(".".join(segments[count:])):
            for name in names:
                if name == tail or name.endswith(f".{tail}"):
                    add = tuple(name.split(".")[: -len(tail.split("."))])
                    if len(add) <= 4 and PREFIX_SEGMENTS.issuperset(add) and add != strip:
                        yield strip, add


def _exchange(
    wishes: Sequence[Wanted], strip: tuple[str, ...], add: tuple[str, ...], resolver: Resolver, taken: set[str]
) -> list[Found]:
    """What every wish is after the exchange, or nothing."""
    rule = f"prefix-solver: `{'.'.join(strip)}` -> `{'.'.join(add)}`"
    found: list[Found] = []
    for wish in wishes:
        segments = tuple(wish.module.split("."))
        if segments[: len(strip)] != strip:
            return []
        names = wish.names(".".join((*add, *segments[len(strip) :])))
        options = (option for name in names for option in resolver.candidates(name, wish.shape, tied=False))
        target = next((option for option in options if wish.fits(option.parameter)), None)
        if target is None or target.parameter.name in taken:
            return []
        how = [part for part in target.rule.split(", ") if part not in ("exact", "base-prefix")]
        found.append(Found(target.parameter, ", ".join((rule, *how))))
    return found if _all_different([option.parameter.name for option in found]) else []


def _all_different(items: list[str]) -> bool:
    return all(a != b for a, b in pairwise(sorted(items)))


def _tied_neighbours(tied: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Every tied name with the others of its group, the shared source first."""
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    return {name: tuple(other for other in group if other != name) for group in groups.values() for name in group}
