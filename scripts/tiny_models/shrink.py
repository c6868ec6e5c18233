"""From a config class to a tiny config: sizes by field name, lists per layer cut to a few layers, rows of data on top.

Invariant: a config depends on its class, the tables and what is given, on nothing else. A row is applied wherever its
model type occurs, also inside another config; what an outer row says of an inner config wins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

from .rows import ROWS
from .sizes import EQUAL, LISTS, SIZES

IDS = ("_token_id", "_token_index")
"""Endings of fields that hold ids of tokens, which must lie inside the vocabulary."""
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "depth")
"""The fields that count layers, in the order in which lists per layer are compared with them."""
KINDS = 4
"""A list with more different values than this does not say of what kind a layer is, but names layers or sizes."""


def tiny(config_class: type[PreTrainedConfig], given: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """The tiny config of a class; fields of `given` win over all others, a dict stands for those of an inner config."""
    return config_class(**fields_of(config_class, given or {}, {}))


def fields_of(
    config_class: type[PreTrainedConfig], given: Mapping[str, Any], outer: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments that make the tiny config; `outer` are those the surrounding class states by default."""
    row = ROWS.get(config_class.model_type, {})
    wanted = _merged(row, given)
    default = _default(config_class, outer)
    names = {field.name for field in fields(config_class)}
    made = _own_fields(default, names) if default is not None else {}
    for name, inner_class in _inner(config_class, default, wanted).items():
        value = wanted.get(name)
        if isinstance(value, Mapping) or (value is None and name not in wanted):
            spec = config_class.sub_configs_defaults.get(name)
            inner_given = dict(value or {})
            inner_class = _class_of(inner_given.pop("model_type", None)) or inner_class
            same = spec is not None and spec.model_type == inner_class.model_type
            made[name] = inner_class(**fields_of(inner_class, inner_given, spec.init_kwargs if same else {}))
    return (
        {key: value for key, value in outer.items() if key not in made}
        | made
        | {
            name: value
            for name, value in wanted.items()
            if name not in made or not isinstance(made[name], PreTrainedConfig)
        }
    )


def _own_fields(default: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """The tiny values of the fields `names` that are no configs."""
    found = {name: getattr(default, name, None) for name in names}
    made = {name: _tiny_value(name, value) for name, value in found.items()}
    made |= {name: value for name, value in LISTS.items() if name in names}
    for name, other, needed in EQUAL:
        if needed in names and found.get(name) and found[name] == found.get(other):
            made[name] = made[other]
    if isinstance(found.get("rope_parameters"), dict):
        head = made.get("head_dim") or SIZES["hidden_size"] // SIZES["num_attention_heads"]
        made["rope_parameters"] = _tiny_rope(found["rope_parameters"], head)
    return {name: value for name, value in made.items() if value is not None} | _layers(default, names)


def _class_of(model_type: str | None) -> type[PreTrainedConfig] | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type] if model_type else None


def _default(config_class: type[PreTrainedConfig], outer: Mapping[str, Any]) -> PreTrainedConfig | None:
    """The config without arguments; None where the class refuses its own defaults."""
    try:
        default = config_class(**outer)
    except Exception:  # each class has its own way to refuse
        return None
    # Of a field that layers may have their own value of, the common one is what becomes tiny.
    default.allow_global_per_layer_attribute_access = True
    return default


def _inner(
    config_class: type[PreTrainedConfig], default: PreTrainedConfig | None, wanted: Mapping[str, Any]
) -> dict[str, type[PreTrainedConfig]]:
    """The classes of the configs inside: those of the default config, and those that are wanted and optional."""
    names = set(config_class.sub_configs) | set(config_class.sub_configs_defaults)
    found = {name: type(getattr(default, name)) for name in sorted(names) if getattr(default, name, None) is not None}
    for name, spec in config_class.sub_configs_defaults.items():
        if name not in found and (not spec.optional or wanted.get(name) is not None):
            found[name] = type(spec.default_config)
    return found


def _tiny_value(name: str, value: Any) -> Any:
    """What a field gets that holds `value` by default; None where it is left alone."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if name.endswith(IDS) and value >= SIZES["vocab_size"]:
        return value % 60 + 3
    return SIZES.get(name) if value > 0 else None


def _tiny_rope(rope: dict[str, Any], head: int) -> dict[str, Any] | None:
    """Sections of a multimodal rotary embedding that add up to half a head of the size `head`."""
    if not rope.get("mrope_section"):
        return None
    half = int(head * rope.get("partial_rotary_factor", 1)) // 2
    parts = len(rope["mrope_section"])
    return rope | {"mrope_section": [half - half // parts * (parts - 1), *[half // parts] * (parts - 1)]}


def _layers(default: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """The lists per layer, cut to the first layers that show every value of each of them, and how many these are."""
    for counter in LAYERS:
        count = getattr(default, counter, None)
        if counter in names and isinstance(count, int) and count > 2:
            break
    else:
        return {}
    lists = {
        name: value
        for name in sorted(names)
        if isinstance(value := getattr(default, name, None), list | tuple)
        and len(value) == count
        and len(set(map(repr, value))) <= KINDS
    }
    kept: list[int] = []
    for value in lists.values():
        for position, item in enumerate(value):
            if item not in [value[other] for other in kept]:
                kept.append(position)
    kept += [position for position in range(count) if position not in kept][: max(0, 2 - len(kept))]
    kept.sort()
    return {
        name: type(value)(SIZES.get(name, value[i]) if isinstance(value[i], int) else value[i] for i in kept)
        for name, value in lists.items()
    } | {counter: len(kept)}


def _merged(row: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the second winning, also inside configs."""
    return {
        name: _merged(row[name], given[name])
        if isinstance(row.get(name), Mapping) and isinstance(given.get(name), Mapping)
        else given.get(name, row.get(name))
        for name in (*row, *(name for name in given if name not in row))
    }
