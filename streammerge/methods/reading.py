"""What reading an adapter against a base yields, and the base as a reader sees it.

A reader turns the parts of one adapter into operations, replacements and, where nothing fits, unmatched keys. It
collects; refusing is left to the ledger, so that all unmatched keys are named at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from streammerge.core.errors import UnmatchedKey
from streammerge.core.tensors import Operation
from streammerge.methods.parts import FullTensor, Parts
from streammerge.names.architectures import Architecture
from streammerge.names.resolve import Found, Missing, Resolver, Wanted


@dataclass(frozen=True, slots=True)
class BaseView:
    """The base as parameters: names, shapes, and where they are stored. Stored names are those of the output's layers,
    which differ from the base's under layer replication."""

    resolver: Resolver

    @property
    def architecture(self) -> Architecture | None:
        """The base's architecture, None for one that is not in the table."""
        return self.resolver.catalog.architecture

    def resolve(self, wishes: Sequence[Wanted]) -> list[Found | Missing]:
        """The targets of an adapter's wishes, all of them at once because the prefix solver needs to see them all."""
        return self.resolver.resolve(wishes)

    def find(self, name: str, shape: tuple[int, ...]) -> Found | None:
        """One parameter by its full name, by all rules but the prefix solver."""
        return self.resolver.find(name, shape)


@dataclass(frozen=True, slots=True)
class AdapterInput:
    """One adapter as a reader gets it: its number, its parts, its raw config, its weight in the sum; and what the user
    says of stacked experts that their files do not."""

    number: int
    parts: Parts
    config: Mapping[str, Any]
    weight: float
    ignored_fields: tuple[str, ...] = ()
    expert_orientation: str = "auto"
    expert_packing: str = "peft"


@dataclass(frozen=True, slots=True)
class FullReplacement:
    """A parameter of the output that is the adapter's own tensor. `rule` is how its name was resolved, `parameter` its
    name in the model; `new` marks one that the base does not have."""

    tensor: str
    part: FullTensor
    rule: str
    new: bool
    parameter: str = ""


@dataclass(slots=True)
class Contribution:
    """What one adapter does to the base. `notes` are sentences for the plan, `ignored` keys that do nothing by the rule
    that says so, `positions` keys of tensors that hold numbers of elements."""

    operations: list[Operation] = field(default_factory=list)
    replacements: list[FullReplacement] = field(default_factory=list)
    unmatched: list[UnmatchedKey] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)
    positions: set[str] = field(default_factory=set)


class Reader(Protocol):
    """How one PEFT type is read."""

    def __call__(self, adapter: AdapterInput, base: BaseView) -> Contribution:
        """The adapter's effect on this base. Raises AdapterError subclasses for what can never be merged."""
