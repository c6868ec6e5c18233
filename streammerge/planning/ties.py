"""Tied tensors by meaning: one tensor as long as both sides end up the same, two and the flag set false when not.

PEFT merges into the shared tensor whichever side was adapted, so that the other side moves with it, and twice where the
adapter holds both sides of one tie. An adapter means each side on its own; that is what is written. Loading ties by
the config's flag and by what is on disk, so both are settled here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from streammerge.core.errors import ConfigContradictionError, NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.methods import FORMULAS
from streammerge.names.architectures import Architecture
from streammerge.names.catalog import Catalog
from streammerge.planning.drafts import EMBEDDING_MODULES, Draft
from streammerge.planning.replicate import Edit
from streammerge.planning.values import same_values
from streammerge.sources.adapter import Adapter
from streammerge.sources.files import TensorFiles, same_bytes


@dataclass(frozen=True, slots=True)
class Settled:
    """What ties lead to: names of the output that copy another stored tensor (name to stored name), adapter tensors
    that are the second copy of one effect (by the rule that says so), edits of config.json, notes for the plan."""

    copies: Mapping[str, str]
    duplicates: Mapping[tuple[int, str], str]
    edits: tuple[Edit, ...] = ()
    notes: tuple[str, ...] = ()


class Ties:
    """Settles the ties of one base, whose weights are read only where both sides of a tie are stored."""

    def __init__(self, catalog: Catalog, adapters: Sequence[Adapter], files: TensorFiles) -> None:
        self.catalog, self.base = catalog, catalog.stored
        self.architecture, self.config = catalog.architecture, catalog.config
        self.adapters, self.files = adapters, files

    def settle(self, drafts: dict[str, Draft]) -> Settled:
        """Settle every tie, changing `drafts` to one for each tensor that will be written.

        Raises NotMergeableError where the sides differ and this class cannot be untied, or where it is not known.
        """
        self._refuse_unknown(drafts)
        if self.architecture is None:
            return Settled({}, {})
        tied = self.architecture.ties(self.config)
        pairs: list[tuple[str, str]] = []
        for target, source in tied.items():
            if pair := self._on_disk(target, source, drafts):
                pairs.append(pair)
                _share_saved_base(drafts, pair)
                _share_tokens(drafts, self._spelling(source), pair)
        parted = [pair for pair in pairs if not self._same_effect(*(drafts.get(name, Draft()) for name in pair))]
        if not parted:
            return Settled({}, self._keep_tied(drafts, pairs))
        self._refuse_untied(parted, drafts)
        edits = self._untie(self.architecture, *parted[0])
        # The flag is one for all ties of the class: with it gone, every side must be on disk.
        copies = {other: physical for physical, other in pairs if other not in self.base}
        notes = tuple(
            f"`{a}` and `{b}` were tied and differ now: both are written, the tie flag is set false" for a, b in parted
        )
        _copy_effects(drafts, pairs, parted)
        return Settled(copies, {}, edits, notes)

    def _on_disk(self, target: str, source: str, drafts: Mapping[str, Draft]) -> tuple[str, str] | None:
        """The stored side of a tie and the other, as spelled in this base; None if the tie is of no concern."""
        names = [self._spelling(name) for name in (source, target)]
        present = [name for name in names if name in self.base]
        if not present:
            self._refuse_elsewhere(target, source, drafts)
            return None
        if len(present) == 2 and not self._same_stored(names[0], names[1]):
            return None  # loaders do not tie two stored tensors that differ
        physical = present[0]
        return physical, names[1] if physical == names[0] else names[0]

    def _same_stored(self, a: str, b: str) -> bool:
        return same_bytes((self.files, self.base[a]), (self.files, self.base[b]))

    def _refuse_elsewhere(self, target: str, source: str, drafts: Mapping[str, Draft]) -> None:
        """A tie declared under names that this checkpoint does not store may still bind what the adapter changes."""
        ends = tuple(f".{'.'.join(name.split('.')[-2:])}" for name in (source, target))
        parts = {piece.tensor for name in (source, target) if (p := self.catalog.parameter(name)) for piece in p.pieces}
        touched = [name for name in drafts if f".{name}".endswith(ends) or name in parts]
        if touched:
            tie = f"`{source}`, tied to `{target}`"
            reason = f"the adapter changes `{touched[0]}`, which may be the stored name of {tie}, or a part of it"
            advice = "tied embeddings that are stored in another form than the model's are not supported yet"
            raise NotMergeableError(tuple(touched), reason, advice)

    def _spelling(self, name: str) -> str:
        """How this base stores a parameter, or would."""
        found = self.catalog.parameter(name) or self.catalog.prefixed(name)
        return (found.tensor if found else None) or self.catalog.spelled(name)

    def _same_effect(self, a: Draft, b: Draft) -> bool:
        if not self._same_replacement(a, b) or len(a.operations) != len(b.operations):
            return False
        return all(self._same_operation(x, y) for x, y in zip(a.operations, b.operations, strict=True))

    def _same_replacement(self, a: Draft, b: Draft) -> bool:
        if a.replacement is None or b.replacement is None:
            return a.replacement is b.replacement
        mine, other = ((self.adapters[d.replaced_by].files, d.replacement.part.info) for d in (a, b) if d.replacement)
        return same_bytes(mine, other)

    def _same_operation(self, a: Operation, b: Operation) -> bool:
        alike = (a.formula, a.numbers, a.indices, a.rounding) == (b.formula, b.numbers, b.indices, b.rounding)
        # A formula that looks at W may look along its rows on one side and along its columns on the other.
        directed = FORMULAS[a.formula].additive or a.place.transposed == b.place.transposed
        return alike and directed and self._same_factors(a, b)

    def _same_factors(self, a: Operation, b: Operation, names: Collection[str] = ()) -> bool:
        if a.factors.keys() != b.factors.keys():
            return False
        return all(
            a.factors[name] == b.factors[name] or same_values(a.factors[name], b.factors[name], self.adapters)
            for name in names or a.factors
        )

    def _keep_tied(self, drafts: dict[str, Draft], pairs: Sequence[tuple[str, str]]) -> dict[tuple[int, str], str]:
        """One recipe for both sides of each tie; a side that is not stored stays unwritten. Returns the duplicates."""
        duplicates: dict[tuple[int, str], str] = {}
        for physical, other in pairs:
            second = drafts.pop(other, None) if other not in self.base else None
            if second:
                rule = f"tied: the same effect as on `{physical}`, applied once"
                duplicates |= dict.fromkeys(second.used() - drafts.get(physical, Draft()).used(), rule)
        return duplicates

    def _refuse_untied(self, parted: Sequence[tuple[str, str]], drafts: Mapping[str, Draft]) -> None:
        """An adapter that was trained with both sides tied and holds two different ones was damaged on its way.

        Not so on a 16-bit base: there PEFT copies the factors to float32, each side for itself, which ends their tie,
        so that they are trained, and act, as two.
        """
        ensured = any(adapter.facts.config.get("ensure_weight_tying") for adapter in self.adapters)
        for pair in parted if ensured else ():
            ours, theirs = (drafts.get(name, Draft()) for name in pair)
            if not ours.used() or not theirs.used():
                continue
            copied = self.base[pair[0]].dtype in ("F16", "BF16")
            if not self._same_replacement(ours, theirs) or not (copied or self._same_product(ours, theirs)):
                reason = f"the config says `ensure_weight_tying`, but the adapter's `{pair[0]}` and `{pair[1]}` differ"
                raise ConfigContradictionError(
                    pair, reason, "save the adapter again; PEFT would load one side over the other"
                )

    def _same_product(self, a: Draft, b: Draft) -> bool:
        """Whether both sides have the same A and B; a DoRA magnitude is each side's own."""
        pairs = [(x, y) for x, y in zip(a.others, b.others, strict=False) if "left" in x.factors]
        return len(a.others) == len(b.others) and all(self._same_factors(*pair, ("left", "right")) for pair in pairs)

    def _untie(self, architecture: Architecture, physical: str, other: str) -> tuple[Edit, ...]:
        """The edits that untie the class, or a refusal that says what the adapter asked for."""
        try:
            return tuple(architecture.untie(self.config))
        except NotMergeableError as error:
            reason = f"the adapter changes one side of the tie between `{physical}` and `{other}`, but {error.reason}"
            advice = "no checkpoint can say what this adapter means"
            raise NotMergeableError((physical, other), reason, advice) from None

    def _refuse_unknown(self, drafts: Mapping[str, Draft]) -> None:
        """Ties of which no more is known than that they exist may concern any embedding the adapter changes."""
        if self.architecture is not None:
            known = f"{self.architecture.name} has ties that are no pairs of names"
            claimed = self.architecture.other_ties
        else:
            known = "the config says that embeddings are tied, but this class is not in the table of ties"
            sections = [self.config, *(value for value in self.config.values() if isinstance(value, Mapping))]
            claimed = any(section.get("tie_word_embeddings") for section in sections)
        settled = {
            self._spelling(n) for pair in (self.architecture.tied.items() if self.architecture else ()) for n in pair
        }
        modules = ((name, name.split(".")[-2:-1]) for name in drafts.keys() - settled)
        touched = [name for name, module in modules if EMBEDDING_MODULES.intersection(module)]
        if claimed and touched:
            raise NotMergeableError((touched[0],), f"the adapter changes `{touched[0]}`, and {known}")


def _copy_effects(
    drafts: dict[str, Draft], pairs: Sequence[tuple[str, str]], parted: Sequence[tuple[str, str]]
) -> None:
    """Ties that fall apart only because another one does: both sides get the same effect."""
    for physical, other in pairs:
        if (physical, other) not in parted and physical in drafts:
            ours = drafts[physical]
            moved = [replace(op, place=replace(op.place, tensor=other)) for op in ours.operations]
            drafts[other] = Draft(ours.replacement, ours.replaced_by, moved)


def _share_saved_base(drafts: dict[str, Draft], pair: tuple[str, str]) -> None:
    """What PEFT saved as the base of an adapted table, of a resized one above all, was the base of both its sides."""
    for here, there in (pair, pair[::-1]):
        draft = drafts.get(here, Draft())
        if draft.replacement and "base_layer" in draft.replacement.part.key.key.split("."):
            other = drafts.setdefault(there, Draft())
            if other.replacement is None:
                other.replacement = replace(draft.replacement, tensor=there)
                other.replaced_by = draft.replaced_by


def _share_tokens(drafts: dict[str, Draft], source: str, pair: tuple[str, str]) -> None:
    """Token rows trained on the source of a tie, the input embedding, are shared by the other side unless it has rows
    of its own; rows of the head are its own: so does PEFT in its forward pass."""
    there = pair[1] if pair[0] == source else pair[0]
    tokens = drafts[source].tokens if source in drafts else []
    draft = drafts.setdefault(there, Draft()) if tokens else None
    if draft is not None and not draft.tokens:
        draft.operations += [replace(op, place=replace(op.place, tensor=there)) for op in tokens]
