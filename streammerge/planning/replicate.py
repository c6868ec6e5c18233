"""`layer_replication`: the output's layers are copies of the base's, each with its own adapter.

PEFT shares the weights of a replicated layer between its copies, so that its merge piles all their deltas onto one
tensor; what the adapter means is one tensor for each new layer, and that is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from streammerge.core.errors import BaseMismatchError, CompositionError, NotMergeableError
from streammerge.core.tensors import TensorInfo

CONTAINERS = ("layers", "layer", "h")
"""Names of the list of layers in the models PEFT replicates: Llama-like, BERT-like, Falcon-like."""
COUNT_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
MAX_LAYERS = 1000
"""Of a model with replicated layers; the deepest of today have some 130."""

Edit = tuple[tuple[str, ...], Any]


@dataclass(frozen=True, slots=True)
class Stock:
    """The base as the output's layers see it: output name to stored tensor, stored names nobody uses by rule, and the
    edits of config.json that follow."""

    tensors: Mapping[str, TensorInfo]
    sources: Mapping[str, str]
    dropped: Mapping[str, str]
    edits: tuple[Edit, ...]


def one_replication(wanted: list[tuple[tuple[int, int], ...]]) -> tuple[tuple[int, int], ...]:
    """The layer replication all adapters agree on, empty for none. Raises CompositionError if they do not agree."""
    if len(set(wanted)) > 1:
        raise CompositionError(("layer_replication",), "the adapters were trained with different layers replicated")
    return wanted[0] if wanted else ()


def replicate(
    base: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, ranges: tuple[tuple[int, int], ...]
) -> Stock:
    """The stock under `ranges` of old layers, or the base itself. Raises BaseMismatchError where they do not fit."""
    if not ranges:
        return Stock(base, {name: name for name in base}, {}, ())
    container, count = _container(base, config)
    # Counted before they are listed: the numbers are a stranger's.
    highest, total = max(last for _, last in ranges) - 1, sum(last - first for first, last in ranges)
    if highest >= count:
        raise BaseMismatchError(
            ("layer_replication",), f"the adapter replicates layer {highest}, the base has {count} layers"
        )
    if total > MAX_LAYERS:
        reason = f"the adapter makes {total:,} layers of the base's {count}, at most {MAX_LAYERS:,} are made"
        raise NotMergeableError(("layer_replication",), reason)
    layers = [old for first, last in ranges for old in range(first, last)]
    tensors: dict[str, TensorInfo] = {}
    sources: dict[str, str] = {}
    for name, info in base.items():
        old = _layer_of(name, container)
        for new, source in enumerate(layers) if old is not None else [(None, None)]:
            if source != old:
                continue
            target = name if new is None else f"{container}.{new}{name[len(f'{container}.{old}') :]}"
            tensors[target], sources[target] = replace(info, name=target), name
    used = set(sources.values())
    dropped = {name: "layer-replication: no new layer is a copy of it" for name in base if name not in used}
    return Stock(tensors, sources, dropped, tuple(_edits(config, count, layers)))


def _container(base: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> tuple[str, int]:
    """The path of the list of layers, and how many it holds."""
    found: dict[str, set[int]] = {}
    for name in base:
        segments = name.split(".")
        for position, segment in enumerate(segments[:-1]):
            if segment in CONTAINERS and segments[position + 1].isdigit():
                found.setdefault(".".join(segments[: position + 1]), set()).add(int(segments[position + 1]))
                break
    expected = {config[field] for field in COUNT_FIELDS if config and field in config}
    fitting = [(path, len(numbers)) for path, numbers in found.items() if not expected or len(numbers) in expected]
    if len(fitting) != 1:
        reason = "the adapter replicates layers, and which tensors of the base are its layers is not clear"
        raise NotMergeableError(tuple(path for path, _ in fitting) or tuple(found), reason)
    return fitting[0]


def _layer_of(name: str, container: str) -> int | None:
    if not name.startswith(f"{container}."):
        return None
    number = name[len(container) + 1 :].split(".", 1)[0]
    return int(number) if number.isdigit() else None


def _edits(config: Mapping[str, Any] | None, count: int, layers: list[int]) -> list[Edit]:
    """The number of layers, and lists with an entry for each layer."""
    edits: list[Edit] = []
    for field, value in (config or {}).items():
        if field in COUNT_FIELDS and value == count:
            edits.append(((field,), len(layers)))
        elif "layer" in field and isinstance(value, list) and len(value) == count:
            edits.append(((field,), [value[old] for old in layers]))
    return edits
