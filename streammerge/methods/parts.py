"""An adapter's tensors sorted by what they are: factors by module, replacements, token rows, copies to ignore.

Only names are looked at, and bytes where two names stand for one parameter. Every tensor lands in exactly one place,
and the ledger holds the plan to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streammerge.core.errors import ConfigContradictionError, IncompleteFactorsError, UnusedKeysError
from streammerge.core.tensors import TensorInfo
from streammerge.core.text import some_of
from streammerge.names.grammar import AdapterKey, KeyKind, parse_key


@dataclass(frozen=True, slots=True)
class ModuleFactors:
    """The factors of one adapted module. `depth` counts the wrappers outside it (experts' parameters are told apart by
    it), `inside` is the module whose wrapper it sits in (attention's `out_proj`)."""

    module: str
    depth: int
    inside: str | None
    slots: Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class FullTensor:
    """One tensor of the adapter that stands for a whole parameter, or for some rows of one."""

    key: AdapterKey
    info: TensorInfo

    @property
    def name(self) -> str:
        """The parameter's name in the adapter's model."""
        return f"{self.key.module}.{self.key.slot}" if self.key.module else self.key.slot


@dataclass(frozen=True, slots=True)
class Parts:
    """An adapter, sorted. `ignored` maps keys to the rule that lets them go."""

    modules: tuple[ModuleFactors, ...]
    replacements: tuple[FullTensor, ...]
    tokens: tuple[FullTensor, ...]
    ignored: Mapping[str, str]


def sort_parts(tensors: Mapping[str, TensorInfo], same: Callable[[TensorInfo, TensorInfo], bool]) -> Parts:
    """Sort the tensors of one adapter file; `same` says whether two of them hold the same bytes.

    Raises ConfigContradictionError where the file holds several adapters, or two tensors for one thing,
    IncompleteFactorsError for empty tensors.
    """
    keys = {name: parse_key(name) for name in tensors}
    _refuse_empty(tensors)
    _refuse_several(keys.values())
    groups: dict[tuple[str, int, str | None], dict[str, TensorInfo]] = {}
    full: dict[KeyKind, list[FullTensor]] = {KeyKind.REPLACEMENT: [], KeyKind.TOKENS: []}
    ignored: dict[str, str] = {}
    for name, key in keys.items():
        match key.kind:
            case KeyKind.FACTOR:
                slots = groups.setdefault((key.module, key.depth, key.inside), {})
                if key.slot in slots:
                    raise ConfigContradictionError(
                        (slots[key.slot].name, name), "two adapter tensors stand for the same factor"
                    )
                slots[key.slot] = tensors[name]
            case KeyKind.BASE_COPY:
                ignored[name] = "a copy of the base that PEFT saved beside the trained tensor"
            case kind:
                full[kind].append(FullTensor(key, tensors[name]))
    modules = tuple(ModuleFactors(*where, slots) for where, slots in groups.items())
    replacements = _one_of_each(full[KeyKind.REPLACEMENT], same, ignored)
    return Parts(modules, replacements, _one_of_each(full[KeyKind.TOKENS], same, ignored), ignored)


def _one_of_each(
    found: list[FullTensor], same: Callable[[TensorInfo, TensorInfo], bool], ignored: dict[str, str]
) -> tuple[FullTensor, ...]:
    """The first tensor of each name. PEFT 0.21 saves a replaced table of a resized vocabulary under two keys."""
    seen: dict[str, FullTensor] = {}
    for item in found:
        first = seen.setdefault(item.name, item)
        if first is item:
            continue
        if not same(first.info, item.info):
            keys = (first.key.key, item.key.key)
            raise ConfigContradictionError(keys, "two adapter tensors stand for the same parameter, and they differ")
        ignored[item.key.key] = f"a second copy of `{first.key.key}`"
    return tuple(seen.values())


def _refuse_empty(tensors: Mapping[str, TensorInfo]) -> None:
    empty = tuple(name for name, info in tensors.items() if info.count == 0)
    if empty:
        raise IncompleteFactorsError(
            empty,
            f"{len(empty):,} of {len(tensors):,} adapter tensors are empty",
            "DeepSpeed ZeRO-3 and FSDP save empty tensors unless parameters are gathered first: save the adapter again",
        )
    if not tensors:
        raise UnusedKeysError((), "the adapter file holds no tensors")


def _refuse_several(keys: object) -> None:
    names = sorted({key.adapter_name for key in keys if key.adapter_name})  # type: ignore[attr-defined]
    if len(names) > 1:
        raise ConfigContradictionError(
            tuple(names),
            f"the file holds {len(names)} adapters in one: {some_of(names)}",
            "save each adapter in a directory of its own",
        )
