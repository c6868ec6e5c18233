"""What transformers declares about each architecture: base prefix, tied names and their flag, experts.

Owns `architectures.json`, which scripts/generate_architectures.py makes from an installed transformers; the package
itself never imports it. Answers come from a parsed config.json alone. What is on disk decides over what is declared:
where a target and its source are both stored and differ, they are not tied, whatever the flag says. The invariant:
nothing handed out can be changed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.errors import NotMergeableError

DATA = Path(__file__).with_name("architectures.json")
FLAG = "tie_word_embeddings"
_LANGUAGE_CONFIGS = ("text_config", "thinker_config", "language_config", "llm_config", "decoder")
"""Where composite configs keep that of their language model."""
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class TieGroup:
    """Tied names, target to source, whose flag is that of the config at `config_path` (empty: config.json itself)."""

    config_path: tuple[str, ...]
    model_type: str
    pairs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model class of transformers, as a config.json names it.

    `tied` maps every target to its source; they hold only where `ties_in_force`. `flag_used`: the forward pass does
    something else with the flag, so that it must not be changed. `tie_flag_paths`: where in config.json the flag may
    stand, outermost first; `tie_default`: what an absent one means. `other_ties`: there are ties besides `tied` that
    are no pairs of names (patterns, shared layers). `expert_orders`: the parameters of each kind of experts,
    routed ones first, in the order in which their module registers them; `experts_transposed`: those of the first kind
    lie (experts, in, out). `conv1d`: names of
    modules that store their weight (in, out).
    """

    name: str
    model_type: str
    base_prefix: str
    tied: Mapping[str, str]
    flag_used: bool
    tie_flag_paths: tuple[tuple[str, ...], ...]
    tie_default: bool
    other_ties: bool
    expert_orders: tuple[tuple[str, ...], ...]
    experts_transposed: bool
    conv1d: frozenset[str]
    groups: tuple[TieGroup, ...]

    def ties(self, config: Mapping[str, Any]) -> dict[str, str]:
        """The tied names, target to source, that `config` puts in force."""
        pairs: dict[str, str] = {}
        for group in self.groups:
            if _flag(config_part(config, group.config_path), group.model_type):
                pairs |= group.pairs
        return pairs

    def ties_in_force(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` ties anything."""
        return bool(self.ties(config))

    def untie(self, config: Mapping[str, Any]) -> list[tuple[tuple[str, ...], bool]]:
        """The edits of `config`, as (path, value), after which nothing is tied. All of `ties(config)` fall apart
        together: every target must then be stored.

        Raises NotMergeableError where the flag does more than tying, or cannot be switched off.
        """
        if not self.ties_in_force(config):
            return []
        edits = [
            (path, False) for path in self.tie_flag_paths if config_part(config, path[:-1]).get(path[-1]) is not False
        ]
        edited = config
        for path, value in edits:
            edited = _with(edited, path, value)
        if self.flag_used:
            raise NotMergeableError((self.name,), f"{self.name} uses `{FLAG}` in its forward pass for more than tying")
        if self.other_ties:
            raise NotMergeableError((self.name,), f"{self.name} has other ties that `{FLAG}` would end too")
        if self.ties_in_force(edited):
            raise NotMergeableError((self.name,), f"{self.name} ties its embeddings whatever `{FLAG}` says")
        return edits

    def sibling(self, suffix: str) -> str | None:
        """The class of the same model type whose name ends with `suffix`, such as `ForSequenceClassification`."""
        return sibling(self.model_type, suffix)


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a parsed config.json describes; None for one that transformers does not have.

    `architectures` decides, then the model type. Either may stand in `text_config` only: transformers 4.57 saved
    Qwen2-VL so.
    """
    table = _table()
    inner = config_part(config, ("text_config",))
    outer_type = config.get("model_type")
    for name in _class_names(config):
        if name in table.type_of:
            return _architecture(name, config)
    for name in _class_names(inner):
        if name in table.type_of and outer_type in (None, table.type_of[name]):
            return _architecture(name, config)
    default = _row(outer_type if outer_type is not None else inner.get("model_type")).get("default")
    return None if default is None else _architecture(default, config)


def sibling(model_type: str, suffix: str) -> str | None:
    """The class of `model_type` whose name ends with `suffix`, such as `ForSequenceClassification`: the shortest."""
    names = [name for name in _row(model_type).get("classes", ()) if name.endswith(suffix)]
    return min(names, key=lambda name: (len(name), name), default=None)


# --- from rows to an architecture -------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Table:
    """The shipped file: rows by model type, rows by class, and the model type of every class."""

    model_types: Mapping[str, Any]
    classes: Mapping[str, Any]
    type_of: Mapping[str, str]


@functools.cache
def _table() -> _Table:
    content = strict_json.loads(io.read_file(DATA, strict_json.MAX_BYTES), str(DATA))
    model_types = content["model_types"]
    type_of = {name: model_type for model_type, row in model_types.items() for name in row.get("classes", ())}
    return _Table(model_types, content["classes"], type_of)


def _row(model_type: object) -> Mapping[str, Any]:
    """The row of a model type, empty if transformers has none such."""
    found: Mapping[str, Any] = (
        _table().model_types.get(model_type, _NOTHING) if isinstance(model_type, str) else _NOTHING
    )
    return found


def _architecture(name: str, config: Mapping[str, Any]) -> Architecture:
    table = _table()
    model_type = table.type_of[name]
    row, own = table.model_types[model_type], table.classes.get(name, _NOTHING)
    groups = tuple(_groups(name, config, (), ""))
    places = dict.fromkeys(place for group in groups for place in _places(config, group.config_path, group.model_type))
    unsaid = config
    for place in places:
        unsaid = _with(unsaid, place, None)
    experts = next((row["experts"] for row in _rows(config, model_type) if "experts" in row), _NOTHING)
    return Architecture(
        name=name,
        model_type=model_type,
        base_prefix=own.get("base", row["base"]),
        tied=MappingProxyType({target: source for group in groups for target, source in group.pairs.items()}),
        flag_used=own.get("flag_used", False),
        tie_flag_paths=tuple(sorted(places, key=len)),
        tie_default=any(_flag(config_part(unsaid, group.config_path), group.model_type) for group in groups),
        other_ties=own.get("other_ties", False),
        expert_orders=tuple(tuple(order) for order in experts.get("params", ())),
        experts_transposed=experts.get("transposed", False),
        conv1d=frozenset(name for row in _rows(config, model_type) for name in row.get("conv1d", ())),
        groups=groups,
    )


def _groups(name: str, config: Mapping[str, Any], path: tuple[str, ...], prefix: str) -> Iterator[TieGroup]:
    """The tie groups of class `name`, whose config is at `path` and whose tensors start with `prefix`."""
    table = _table()
    model_type, row = table.type_of[name], table.classes.get(name, _NOTHING)
    for below, pairs in row.get("ties", _NOTHING).items():
        prefixed = MappingProxyType({prefix + target: prefix + source for target, source in pairs.items()})
        sub_path = path + tuple(below.split(".")) if below else path
        yield TieGroup(
            sub_path, _type_at(config, sub_path, model_type if not below else _sub_type(model_type, below)), prefixed
        )
    for attribute, (below, head) in row.get("auto", _NOTHING).items():
        sub_path = path + tuple(below.split("."))
        inner = _row(_type_at(config, sub_path, _sub_type(model_type, below)))
        if "default" in inner:
            yield from _groups(inner.get(head, inner["default"]), config, sub_path, f"{prefix}{attribute}.")


def _type_at(config: Mapping[str, Any], path: tuple[str, ...], otherwise: str) -> str:
    """The model type of the config at `path`; `otherwise` where it names none that transformers has."""
    named = config_part(config, path).get("model_type")
    return named if isinstance(named, str) and "tie" in _row(named) else otherwise


def _sub_type(model_type: str, below: str) -> str:
    found: str = _row(model_type).get("subs", _NOTHING).get(below, "")
    return found


def _rows(config: Mapping[str, Any], model_type: str) -> Iterator[Mapping[str, Any]]:
    """The rows of the config and of the language models inside it, outermost first."""
    yield _row(_type_at(config, (), model_type))
    for name in _LANGUAGE_CONFIGS:
        inner = config_part(config, (name,))
        if inner:
            yield from _rows(inner, "")


# --- the tie flag -----------------------------------------------------------------------------------------------------
def _flag(config: Mapping[str, Any], model_type: str) -> bool:
    """Whether transformers, reading `config`, sets the tie flag."""
    row = _row(_type_at(config, (), model_type))
    said = next((config[key] for key in row.get("keys", (FLAG,)) if config.get(key) is not None), None)
    default = row.get("tie", False)
    if said is None:
        said = _sub_flag(config, row, default) if isinstance(default, str) else default
    return bool(said) or ("or" in row and _sub_flag(config, row, row["or"]))


def _sub_flag(config: Mapping[str, Any], row: Mapping[str, Any], name: str) -> bool:
    return _flag(config_part(config, (name,)), row["subs"][name])


def _places(config: Mapping[str, Any], path: tuple[str, ...], model_type: str) -> Iterator[tuple[str, ...]]:
    """Where the flag of the config at `path` may stand: its own keys and those of the sub-configs that count, or
    counted for transformers 4."""
    part = config_part(config, path)
    row = _row(_type_at(part, (), model_type))
    keys = row.get("keys", (FLAG,))
    yield from ((*path, key) for key in keys if key in part or key == keys[-1])
    subs = {row.get("or"), row.get("text"), row.get("tie")}
    for name in sorted(sub for sub in subs if isinstance(sub, str)):
        if isinstance(part.get(name), Mapping):
            yield from _places(config, (*path, name), row.get("subs", _NOTHING).get(name, ""))


# --- parts of a config ------------------------------------------------------------------------------------------------
def _class_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names[:1] if isinstance(name, str)] if isinstance(names, list) else []


def config_part(config: Mapping[str, Any], path: tuple[str, ...]) -> Mapping[str, Any]:
    """The object at `path`, empty where there is none."""
    for name in path:
        inner = config.get(name)
        if not isinstance(inner, Mapping):
            return _NOTHING
        config = inner
    return config


def _with(config: Mapping[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A copy of `config` with `value` at `path`."""
    first, *rest = path
    return {**config, first: _with(config_part(config, (first,)), tuple(rest), value) if rest else value}
