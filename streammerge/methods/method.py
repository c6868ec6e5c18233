"""A PEFT type as a declaration: what its config and its file hold, where it can look, and the operations it means.

A method is a subclass and one row of the table in `methods/__init__.py`; reading, resolving, placing, weights, ledger
and documents follow from what is declared here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from streammerge.methods.base import Formula
from streammerge.methods.fields import Known
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.reading import AdapterInput
from streammerge.names.pieces import Sizes

Slots = tuple[frozenset[str], frozenset[str]]
"""The slots that a module must have, and those that it may have."""


def slots(required: str, optional: str = "") -> Slots:
    """Slots by their names, spaces between them."""
    return frozenset(required.split()), frozenset(optional.split())


class Method(ABC):
    """One PEFT type. What a subclass does not say has the usual value."""

    title: ClassVar[str]
    """Its name, as its authors write it."""
    paper: ClassVar[str]
    """Where the formula is from."""
    known: ClassVar[Known] = Known()
    """The config's fields."""
    only: ClassVar[str]
    """Its name in `bias="<name>_only"`."""
    tokens_in: ClassVar[str | None] = None
    """The config's field with the rows of trained tokens, where it has one."""
    modules: ClassVar[tuple[Slots, ...]]
    """The sets of slots that a module can have; a number at the end of a slot is not looked at."""
    shared: ClassVar[frozenset[str]] = frozenset()
    """Slots of the adapter as a whole; of an open slot its first part."""
    positions: ClassVar[frozenset[str]] = frozenset()
    """Slots that hold integers: numbers of elements."""
    duplicates: ClassVar[frozenset[str]] = frozenset()
    """Slots that PEFT saves with every module though they say what shared ones say: not used."""
    formulas: ClassVar[Mapping[str, Formula]]
    """The formulas that its operations name."""
    layers: ClassVar[str]
    """The kinds of layers, for the documents."""
    local: ClassVar[str]
    """What a tile needs, for the documents."""
    eras: ClassVar[str] = ""
    """How files of different PEFT versions are told apart, for the documents."""
    refuses: ClassVar[str] = ""
    """What is refused, for the documents."""

    note: ClassVar[str] = ""
    """A sentence for the plan of every adapter of the type."""

    def check(self, adapter: AdapterInput) -> None:
        """Refuse an adapter for what it is as a whole, before any of its modules is looked at."""
        return

    def shape(self, module: ModuleFactors) -> Sizes | None:
        """The weight's shape (out, in) as far as the factors tell it: then it is found inside fused tensors too."""
        return None

    def parameters(self, module: ModuleFactors) -> tuple[str, ...]:
        """The names of the parameter that the factors are about, the first that the base has."""
        return ("weight",)

    def idle(self, module: Module) -> Mapping[str, str]:
        """The module's slots that change nothing in this base, each with the rule that says so."""
        return {}

    @abstractmethod
    def effects(self, module: Module) -> Iterator[Effect]:
        """What the module's factors do."""
