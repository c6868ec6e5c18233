"""Building a plan: the order in which facts are looked at, each step refusing what it cannot stand for.

Cheap refusals come first, the values of the adapter last; the base's weights are not read, but for two sides of a tie
that are both on disk, and for a table that PEFT saved beside an embedding.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from streammerge.core.collector import collector_paused
from streammerge.core.dtypes import BY_OPTION, FLOATS
from streammerge.core.errors import BaseMismatchError
from streammerge.core.options import Options
from streammerge.core.tensors import OutputTensor, Replacement, Source, Stored, TensorInfo
from streammerge.core.text import some_of
from streammerge.formats.filenames import CONFIG
from streammerge.methods.fields import with_version
from streammerge.methods.lora_config import parse_config
from streammerge.methods.parts import Parts
from streammerge.methods.readers import read_adapter
from streammerge.methods.reading import AdapterInput, BaseView, Contribution
from streammerge.names.architectures import architecture_of
from streammerge.names.catalog import Catalog
from streammerge.names.conversions import load_checked, shipped
from streammerge.names.resolve import Resolver
from streammerge.planning import ledger
from streammerge.planning.adapted import rules_of, unknown_base
from streammerge.planning.config_edits import dtype_edits, edited, head_edits, vocabulary_edits
from streammerge.planning.drafts import EMBEDDING_MODULES, Draft, changed_rows, collect, new_shape
from streammerge.planning.layout import lay_out
from streammerge.planning.memory import figures
from streammerge.planning.model import AdapterRecord, BaseRecord, MergePlan
from streammerge.planning.quantized import refuse_low_bit, refuse_quantized
from streammerge.planning.replicate import Edit, Stock, one_replication, replicate
from streammerge.planning.sidecars import SidecarPlan, plan_sidecars
from streammerge.planning.ties import Settled, Ties
from streammerge.planning.values import PIECE, check_finite, facts_of, parts_of
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import Checkpoint
from streammerge.sources.files import same_bytes


def build_plan(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], options: Options
) -> MergePlan:
    """The plan of merging `adapters`, each with its weight, into `checkpoint`. Raises every refusal there is."""
    with collector_paused():
        return _Builder(checkpoint, adapters, weights, options).plan()


class _Builder:
    def __init__(
        self, checkpoint: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], options: Options
    ) -> None:
        self.checkpoint, self.adapters, self.weights, self.options = checkpoint, adapters, weights, options
        self.base = checkpoint.facts
        self.config: Mapping[str, Any] = self.base.config or {}
        self.architecture = architecture_of(self.config) if self.base.config else None
        self.table = load_checked(Path(options.rules)) if options.rules else shipped()

    def plan(self) -> MergePlan:
        refuse_quantized(self.base.config, self.base.tensors)
        stock, catalog, contributions, ignored = self._read_adapters()
        drafts = collect(contributions)
        ties = Ties(catalog, self.adapters, self.checkpoint.files)
        settled = ties.settle(drafts)
        for (number, key), rule in dict(settled.duplicates).items():
            ignored[number][key] = rule
        outputs = self._outputs(stock, settled, drafts)
        self._check_ledger(drafts, outputs, stock, ignored)
        facts = facts_of(outputs.values(), self.adapters)
        ledger.check_effect(outputs.values(), facts, self.weights)
        layout = lay_out(self.base, outputs, stock.sources, self.options.shard_limit())
        rows = changed_rows(drafts, stock.tensors)
        edits = self._edits(stock, settled, outputs, rows)
        sidecars = self._sidecars(outputs)
        notes = [note for contribution in contributions for note in contribution.notes] + list(settled.notes)
        return MergePlan(
            base=self._base_record(),
            adapters=tuple(self._adapter_record(number, ignored[number]) for number in range(len(self.adapters))),
            options=self.options.byte_options(),
            tensors=outputs,
            facts=facts,
            shards=layout.shards,
            index=layout.index,
            config=(edited(self.config, edits) if edits else self.base.config_bytes)
            if self.base.config_bytes
            else None,
            config_edits=tuple(edits),
            dropped=stock.dropped,
            sidecars=sidecars.files,
            left_out=sidecars.left_out,
            code=sidecars.code,
            notes=(*self._base_notes(rules_of(outputs.values())), *notes),
            figures=figures(outputs, layout.shards, self.base.tensors.values(), self.options),
        )

    def _read_adapters(self) -> tuple[Stock, Catalog, list[Contribution], list[dict[str, str]]]:
        parts = [parts_of(adapter) for adapter in self.adapters]
        fields = self.options.ignore_config_field
        replications = [
            parse_config(a.facts.config, fields).layer_replication
            for a in self.adapters
            if a.facts.config.get("peft_type") == "LORA"
        ]
        stock = replicate(self.base.tensors, self.base.config, one_replication(replications))
        catalog = Catalog(stock.tensors, self.architecture, self.config, self.table)
        view = BaseView(Resolver(catalog))
        contributions: list[Contribution] = []
        ignored: list[dict[str, str]] = []
        for number, (adapter, part, weight) in enumerate(zip(self.adapters, parts, self.weights, strict=True)):
            if weight != 1 or len(parts) > 1:
                part = self._without_copies(adapter, part, view)
            config = with_version(adapter.facts.config, self.options.peft_version)
            given = (fields, self.options.expert_orientation, self.options.expert_packing)
            contribution = read_adapter(AdapterInput(number, part, config, weight, *given), view)
            ignored.append(
                {**part.ignored, **contribution.ignored}
                | ledger.let_go(contribution, adapter, self.options.allow_unused)
            )
            contributions.append(contribution)
        for adapter, contribution in zip(self.adapters, contributions, strict=True):
            check_finite(adapter, contribution.positions)
        return stock, catalog, contributions, ignored

    def _without_copies(self, adapter: Adapter, parts: Parts, view: BaseView) -> Parts:
        """The parts without replacements that are the base's own values. PEFT saves the table of an adapted embedding
        with it; for a weighted or one of several adapters it matters that this replaces nothing."""
        stored = view.resolver.catalog.stored
        copies = {
            part.key.key: "the base's own values, saved with the adapter"
            for part in parts.replacements
            if (found := view.find(part.name, part.info.shape))
            and found.parameter.tensor
            and same_bytes((adapter.files, part.info), (self.checkpoint.files, stored[found.parameter.tensor]))
        }
        kept = tuple(part for part in parts.replacements if part.key.key not in copies)
        return dataclasses.replace(parts, replacements=kept, ignored={**parts.ignored, **copies})

    def _outputs(self, stock: Stock, settled: Settled, drafts: Mapping[str, Draft]) -> dict[str, OutputTensor]:
        """The recipe of every tensor: the base's in their order, then the other sides of ties, then new heads."""
        outputs: dict[str, OutputTensor] = {}
        copies = dict(settled.copies)
        new = [name for name in drafts if name not in stock.tensors and name not in copies]
        for name in (*stock.tensors, *copies, *new):
            info = stock.tensors.get(copies.get(name, name))
            draft = drafts.get(name, Draft())
            source: Source
            if draft.replacement:
                source = draft.source(draft.replacement)
            else:
                source = Stored(stock.sources[copies.get(name, name)])
            if info is not None and (draft.operations or draft.replacement) and info.dtype not in FLOATS:
                refuse_low_bit(info)
            dtype = info.dtype if info else draft.replacement.part.info.dtype  # type: ignore[union-attr]
            if self.options.dtype != "auto" and dtype in FLOATS:
                dtype = BY_OPTION[self.options.dtype]
            outputs[name] = OutputTensor(name, dtype, new_shape(name, draft, info), source, tuple(draft.operations))
        self._check_rows(outputs, stock.tensors, drafts)
        return outputs

    def _check_rows(
        self, outputs: Mapping[str, OutputTensor], tensors: Mapping[str, TensorInfo], drafts: Mapping[str, Draft]
    ) -> None:
        """A resized vocabulary resizes every table with a row for each token, or the base is another one."""
        for name, (old, new) in changed_rows(drafts, tensors).items():
            for other, output in outputs.items():
                module = other.split(".")[-2] if "." in other else ""
                if module in EMBEDDING_MODULES and len(output.shape) == 2 and output.shape[0] == old:
                    reason = f"the adapter brings `{name}` with {new:,} rows, `{other}` keeps the base's {old:,}"
                    raise BaseMismatchError((name, other), reason, "merge into a base whose embeddings were resized")

    def _check_ledger(
        self,
        drafts: Mapping[str, Draft],
        outputs: Mapping[str, OutputTensor],
        stock: Stock,
        ignored: Sequence[Mapping[str, str]],
    ) -> None:
        used = {pair for draft in drafts.values() for pair in draft.used()}
        for number, adapter in enumerate(self.adapters):
            ledger.check_adapter(adapter, {key for owner, key in used if owner == number}, ignored[number])
        ledger.check_base(self.base.tensors, outputs.values(), stock.sources, stock.dropped)

    def _edits(
        self, stock: Stock, settled: Settled, outputs: Mapping[str, OutputTensor], rows: Mapping[str, tuple[int, int]]
    ) -> list[Edit]:
        if not self.base.config_bytes:
            return []
        new = [
            output
            for name, output in outputs.items()
            if name not in stock.tensors and isinstance(output.source, Replacement)
        ]
        task = str(self.adapters[0].facts.config.get("task_type") or "")
        edits = [*stock.edits, *settled.edits, *dtype_edits(self.config, self.options.dtype)]
        edits += vocabulary_edits(self.config, dict.fromkeys(rows.values()))
        return edits + head_edits(
            self.config, [o for o in new if o.name not in dict(settled.copies)], self.architecture, task
        )

    def _sidecars(self, outputs: Mapping[str, OutputTensor]) -> SidecarPlan:
        if self.base.lone:
            return SidecarPlan((), (), ())
        tables = [
            o.shape[0]
            for name, o in outputs.items()
            if set(name.split(".")[-2:-1]) & EMBEDDING_MODULES and len(o.shape) == 2
        ]
        files = {shard.file for shard in self.base.shards}
        roots = [str(adapter.facts.root) for adapter in self.adapters]
        rows = max(tables, default=None)
        return plan_sidecars(str(self.base.root), files, roots, rows, no_code=self.options.no_code)

    def _base_notes(self, rules: Iterable[str]) -> list[str]:
        notes = [unknown_base(self.base.config, rules)] if self.architecture is None else []
        if self.options.no_code and self.config.get("auto_map"):
            notes.append(f"`{CONFIG}` keeps its `auto_map`, which names code that the output does not have")
        folders = [name for adapter in self.adapters for name in adapter.facts.siblings]
        return notes + ([f"other adapters in subfolders are not merged: {some_of(folders)}"] if folders else [])

    def _base_record(self) -> BaseRecord:
        digest = hashlib.sha256(self.base.config_bytes)
        for shard in self.base.shards:
            digest.update(shard.header.raw if shard.header else repr(shard.tensors).encode())
        return BaseRecord(
            self.base.identity, digest.hexdigest(), {shard.file: shard.size for shard in self.base.shards}
        )

    def _adapter_record(self, number: int, ignored: Mapping[str, str]) -> AdapterRecord:
        adapter = self.adapters[number]
        digest = xxhash.xxh3_128(adapter.facts.config_bytes)
        for info in adapter.facts.tensors.values():
            digest.update(f"{info.name}\0{info.dtype}\0{info.shape}".encode())
            for start in range(0, info.nbytes, 4 * PIECE):
                digest.update(adapter.files.read(info, start, min(start + 4 * PIECE, info.nbytes)))
            adapter.files.give_back(info, 0, info.nbytes)
        return AdapterRecord(adapter.facts.identity, digest.hexdigest(), self.weights[number], dict(ignored))
