"""The parameters of a base: every stored tensor under the model's name for it, and in which way it lies there.

Both sides are made canonical, then joined: names on disk by the rules of the table when the catalog is made, names of
an adapter, of whichever era, when they are looked up. The invariant: a stored tensor is in the catalog under one
canonical name or, where the rules do not fit what is stored, under its own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streammerge.core.tensors import TensorInfo
from streammerge.names.architectures import Architecture
from streammerge.names.conversions import Rewritten, Table, Transform, shipped
from streammerge.names.operators import Part, Setting, apply_operators
from streammerge.names.pieces import Parameter, Piece, through

STACKING = ("MergeModulelist", "ErnieFuseAndSplitTextVisionExperts")
OWN, OTHER = "own", "other"


class Catalog:
    """The parameters of one base, by canonical name. `table` holds the conversion rules, the shipped ones by
    default."""

    def __init__(
        self,
        stored: Mapping[str, TensorInfo],
        architecture: Architecture | None,
        config: Mapping[str, Any] | None = None,
        table: Table | None = None,
    ) -> None:
        self.stored, self.architecture, self.config = stored, architecture, config or {}
        self.conversions = (table or shipped()).conversions(architecture, self.config, stored)
        self.prefix = f"{architecture.base_prefix}." if architecture and architecture.base_prefix else ""
        self._plain: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._made: dict[str, Parameter] = {}
        self._doubled: dict[str, list[str]] = {}
        self._fill()
        self._inner = self._without_prefix()

    def _fill(self) -> None:
        groups: dict[tuple[str, str], list[tuple[str, Rewritten]]] = {}
        for name in self.stored:
            rewritten = self.conversions.rewrite(name)
            if rewritten.converter is None:
                self._enter(rewritten.name, name, rewritten.rules)
            else:
                groups.setdefault((rewritten.name, rewritten.converter.key), []).append((name, rewritten))
        for members in groups.values():
            try:
                made = self._converted(members)
            except ValueError:  # stored in another way than the rule is for: each tensor speaks for itself
                made = {}
                for name, _ in members:
                    self._enter(name, name, ())
            self._made |= made
        for name in self._made.keys() & self._plain.keys():
            pieces = self._made.pop(name).pieces
            self._doubled[name] = list(dict.fromkeys((self._plain[name][0], *(piece.tensor for piece in pieces))))

    def _enter(self, canonical: str, name: str, rules: tuple[str, ...]) -> None:
        if canonical in self._plain:
            self._doubled.setdefault(canonical, [self._plain[canonical][0]]).append(name)
        self._plain[canonical] = name, rules

    def _converted(self, members: Sequence[tuple[str, Rewritten]]) -> dict[str, Parameter]:
        """The parameters that one conversion makes of the stored tensors that take part in it."""
        rewritten = members[0][1]
        transform = _converter(rewritten)
        parts: dict[str, list[Part]] = {}
        for number, source in enumerate(transform.sources):
            names = _ordered({own.renamed: name for name, own in members if own.source == number}, source)
            parts[source] = [Part(self.stored[n].shape, (Piece.whole(n, self.stored[n].shape),)) for n in names]
        made = apply_operators(parts, transform.steps, self._setting(transform))
        dtype = self.stored[members[0][0]].dtype
        rules = tuple(dict.fromkeys(rule for _, own in members for rule in own.rules))
        return {
            name: Parameter(name, dtype, made[target].shape, made[target].pieces, rules)
            for target, name in _expanded(rewritten.name, transform.targets).items()
        }

    def _setting(self, transform: Transform) -> Setting:
        return Setting(transform.sources, transform.targets, self.config)

    def _without_prefix(self) -> dict[str, str | None]:
        """Canonical names by what they are without the base-model prefix; None for two that are then the same."""
        inner: dict[str, str | None] = {}
        for name in (*self._plain, *self._made):
            short = name.removeprefix(self.prefix)
            inner[short] = None if short in inner else name
        return inner

    # --- looking up ---------------------------------------------------------------------------------------------------
    @property
    def names(self) -> list[str]:
        """Every name something is found under: canonical ones and stored ones."""
        return list(dict.fromkeys((*self._plain, *self._made, *self.stored)))

    @functools.cached_property
    def endings(self) -> frozenset[str]:
        """The last two segments of every name."""
        return frozenset(".".join(name.split(".")[-2:]) for name in self.names)

    def parameter(self, name: str) -> Parameter | None:
        """The parameter with exactly this canonical name."""
        if name in self._made:
            return self._made[name]
        if name in self._plain and name not in self._doubled:
            stored, rules = self._plain[name]
            return Parameter.stored_as(self.stored[stored], name, rules)
        return None

    def prefixed(self, name: str) -> Parameter | None:
        """The parameter with this canonical name but for the base-model prefix, on either side."""
        full = self._inner.get(name.removeprefix(self.prefix))
        return self.parameter(full) if full else None

    def tensor(self, name: str) -> Parameter | None:
        """The tensor stored under this name, as it is. None for one that is stored a second time under another name of
        the same parameter: nobody can say which of them counts."""
        if name not in self.stored or self.twin(name):
            return None
        return Parameter.stored_as(self.stored[name], self._canonical.get(name))

    def twin(self, name: str) -> str | None:
        """The name under which what `name` stands for is stored a second time, if it is."""
        if not self._doubled:
            return None
        canonical = self.conversions.rewrite(name).name
        others = self._doubled.get(canonical, ())
        return next((other for other in others if other != name), None)

    @functools.cached_property
    def _canonical(self) -> dict[str, str]:
        """Stored names to the names of the parameters they are."""
        return {stored: canonical for canonical, (stored, _) in self._plain.items()}

    def translated(self, name: str, shape: tuple[int, ...] | None) -> Parameter | None:
        """The tensor that another era of names, or a checkpoint that is stored in another way, calls `name`, of that
        shape if it is known. None where the rules do not lead to anything stored."""
        rewritten = self.conversions.rewrite(name)
        if rewritten.converter is None:
            found = self._either(rewritten.name) if rewritten.rules else None
            return replace(found, rules=tuple(dict.fromkeys((*rewritten.rules, *found.rules)))) if found else None
        below = {target: self._either(full) for target, full in self._targets(rewritten).items()}
        present = {target: found for target, found in below.items() if found}
        if shape is None or len(present) < len(below):
            return None
        try:
            pieces = self._own_pieces(name, shape, rewritten, present)
            found = through(name, next(iter(present.values())).dtype, pieces, {p.name: p for p in present.values()})
        except ValueError:
            return None
        return replace(found, rules=tuple(dict.fromkeys((*rewritten.rules, *found.rules)))) if found.complete else None

    def _either(self, name: str) -> Parameter | None:
        return self.parameter(name) or self.prefixed(name)

    def _targets(self, rewritten: Rewritten) -> dict[str, str]:
        return _expanded(rewritten.name, _converter(rewritten).targets)

    def _own_pieces(
        self, name: str, shape: tuple[int, ...], rewritten: Rewritten, below: Mapping[str, Parameter]
    ) -> list[Piece]:
        """Where a tensor of this name would lie in the parameters that a conversion makes of it and others like it."""
        transform = _converter(rewritten)
        stacked = any(step in STACKING for step, _ in transform.steps)
        count = sum(parameter.shape[0] for parameter in below.values()) if stacked else 1
        index = _index(rewritten.renamed, transform.sources[rewritten.source]) if stacked else 0
        parts = {
            source: [
                Part(shape, (Piece.whole(OWN if (number, n) == (rewritten.source, index) else OTHER, shape),))
                for n in range(count)
            ]
            for number, source in enumerate(transform.sources)
        }
        made = apply_operators(parts, transform.steps, self._setting(transform))
        if any(made[target].shape != parameter.shape for target, parameter in below.items()):
            raise ValueError(f"{name} of shape {shape} does not fit what is stored")
        return [
            piece.inverted(made[target].shape, parameter.name)
            for target, parameter in below.items()
            for piece in made[target].pieces
            if piece.tensor == OWN
        ]

    def spelled(self, name: str) -> str:
        """How a checkpoint like this one would store the parameter with this canonical name, which it does not hold."""
        heads = {tuple(stored.split(".")[:n]) for stored in self.stored for n in (1, 2)}
        segments = name.split(".")
        candidates = {".".join((*head, *segments[n:])) for head in heads for n in range(min(3, len(segments)))}
        found = [other for other in candidates - {name} if self.conversions.rewrite(other).name == name]
        renamed = any(name != stored for name, (stored, _) in self._plain.items())
        return min(found, key=lambda other: (len(other), other)) if renamed and found else name


def _converter(rewritten: Rewritten) -> Transform:
    if rewritten.converter is None:
        raise ValueError(f"{rewritten.name} takes part in no conversion")
    return rewritten.converter


def _ordered(names: Mapping[str, str], source: str) -> list[str]:
    """Stored names, given by the names that one source pattern matched, by their index. Raises ValueError where one is
    missing."""
    if not names:
        raise ValueError(f"nothing is stored for {source}")
    if "*" not in source:
        if len(names) > 1:
            raise ValueError(f"{len(names)} tensors for {source}")
        return list(names.values())
    indexed = sorted((_index(renamed, source), name) for renamed, name in names.items())
    if [index for index, _ in indexed] != list(range(len(indexed))):
        raise ValueError(f"the tensors for {source} are not numbered without a gap")
    return [name for _, name in indexed]


def _index(name: str, source: str) -> int:
    """The number that `*` stands for."""
    found = re.search(r"(?P<index>\d+)\.".join(source.split("*.")), name)
    if found is None:
        raise ValueError(f"{name} has no number where {source} wants one")
    return int(found.group("index"))


def _expanded(name: str, targets: Sequence[str]) -> dict[str, str]:
    """Targets of a conversion with the full names they make; `name` is that of one of them."""
    present = next(target for target in targets if target in name)
    before, _, after = name.partition(present)
    return {target: f"{before}{target}{after}" for target in targets}
