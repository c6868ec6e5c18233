"""Writes streammerge/names/architectures.json: what transformers declares about ties, base prefixes and experts.

Needs the development dependency transformers; builds no model and downloads nothing. Class attributes are read, config
classes are asked (with every placement of the tie flag that matters) and modeling sources are parsed. The output is a
function of the installed transformers version alone. Run: python scripts/generate_architectures.py [--check]
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers_source import ModelingSource, derived_from_flag, handles_flag, other_flags

TARGET = Path(__file__).parents[1] / "streammerge" / "names" / "architectures.json"
FORMAT = 1
FLAG = "tie_word_embeddings"
# A path such as `lm_head.weight`: no pattern, no module. All else is only marked as `other_ties`.
PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+\.(weight|bias)")
# The class that a model type alone stands for: the most specific head that language models are published with.
DEFAULT_HEADS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
CAUSAL_HEAD = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
# Models inside a model that the default config decides; those with a head are looked up when a config.json is read.
HEADLESS = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForTextEncoding": modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
}
HEADED = {
    "AutoModelForCausalLM": "causal",
    "AutoModelForSeq2SeqLM": "default",
    "AutoModelForImageTextToText": "default",
}


def concrete_classes(families: Collection[str] = ()) -> dict[str, type]:
    """Every importable model class of transformers that a checkpoint can name, by name; with `families`, at least
    those of the named packages of `transformers.models`."""
    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        if families and file.parent.name not in families:
            continue
        # A few modules need packages that a machine without audio or vision support lacks.
        with contextlib.suppress(ImportError):
            importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
    pending, found = [transformers.PreTrainedModel], {}
    while pending:
        for cls in pending.pop().__subclasses__():
            pending.append(cls)
            named = not cls.__name__.endswith("PreTrainedModel") and cls.__module__.startswith("transformers.models.")
            if named and getattr(cls.config_class, "model_type", ""):
                found[cls.__name__] = cls
    return dict(sorted(found.items()))


# --- configs --------------------------------------------------------------------------------------------------------
def config_rule(config_class: type) -> dict[str, Any]:
    """How the tie flag of `config_class` comes out of a config.json: `tie` is its default, or the
    sub-config that has it; `keys` the names it is read from where these are others, `or` a sub-config whose flag
    counts too. Without keys and sub-config nothing changes it."""
    subs = sub_configs(config_class) if handles_flag(config_class) else {}
    subs = {name: sub for name, sub in subs.items() if _matters(config_class, name, sub[0])}
    # Without the help of a sub-config, the flag's own effect shows.
    alone = {name: {**sub, FLAG: False} for name, (sub, _) in subs.items()}
    default = _flag(config_class, alone)
    if default is None:
        return {"tie": bool(getattr(config_class, FLAG, False))}
    keys = [
        key
        for key in (*sorted(other_flags(config_class)), FLAG)
        if _flag(config_class, {**alone, key: True}) != _flag(config_class, {**alone, key: False})
    ]
    rule: dict[str, Any] = {"tie": bool(default)}
    if keys != [FLAG]:
        rule["keys"] = keys
    for name, (sub, _) in subs.items():
        counts_too = keys and _flag(config_class, {FLAG: False, name: {**sub, FLAG: True}})
        rule |= {"or": name} if counts_too else {"tie": name}
    # The sub-config that transformers 4 consulted, whatever this version does.
    if "text_config" in sub_configs(config_class):
        rule["text"] = "text_config"
    return rule


def _matters(config_class: type, name: str, sub: dict[str, Any]) -> bool:
    """Whether the flag of the sub-config `name` changes the flag of the whole, said outside or not."""
    for outside in ({}, {FLAG: False}):
        on, off = (_flag(config_class, {**outside, name: {**sub, FLAG: value}}) for value in (True, False))
        if None not in (on, off) and on != off:
            return True
    return False


def _flag(config_class: type, fields: dict[str, Any]) -> bool | None:
    """The tie flag of the config that transformers makes of `fields`; None where it refuses them."""
    try:
        config = config_class(**{"model_type": config_class.model_type, **fields})
    except Exception:  # each config class has its own way to refuse
        return None
    return bool(getattr(config, FLAG, False))


@functools.cache
def sub_configs(config_class: type) -> dict[str, tuple[dict[str, Any], str]]:
    """The sub-configs that a default config has: their fields without the flag, and model type."""
    try:
        config = config_class()
        fields = config.to_dict()
    except Exception:  # configs without defaults
        return {}
    subs = {}
    for name in sorted(config_class.sub_configs):
        sub = fields.get(name)
        if isinstance(sub, dict) and sub.get("model_type"):
            subs[name] = ({key: value for key, value in sub.items() if key != FLAG}, sub["model_type"])
    return subs


# --- classes --------------------------------------------------------------------------------------------------------
class Classes:
    """The model classes and what is read from each."""

    def __init__(self, families: Collection[str] = ()) -> None:
        self.by_name = concrete_classes(families)
        self.sources = {module: ModelingSource(module) for module in {c.__module__ for c in self.by_name.values()}}
        self.heads = [getattr(modeling_auto, name, {}) for name in DEFAULT_HEADS]

    def entry(self, name: str) -> dict[str, Any]:
        """What is not the same for every class of a model type: ties by sub-config, heads inside, uses of the flag."""
        cls = self.by_name[name]
        source = self.sources[cls.__module__]
        ties, auto, other = self._ties(cls, ())
        reached = source.reachable(cls)
        used = source.forward_reads(reached, {FLAG, *derived_from_flag(cls.config_class)})
        entry = {"ties": ties, "auto": auto, "other_ties": other, "flag_used": used}
        return {key: value for key, value in entry.items() if value}

    def _ties(self, cls: type, above: tuple[type, ...]) -> tuple[dict[str, dict[str, str]], dict[str, list[str]], bool]:
        """Tied names by the sub-config that holds their flag, with those of the models inside; heads inside that only
        the config names, and whether there are ties of another kind."""
        declared = cls.__dict__.get("_tied_weights_keys", getattr(cls, "_tied_weights_keys", None))
        source = self.sources[cls.__module__]
        written = source.built_ties(cls)
        other = not isinstance(declared, dict | None) or None in written
        pairs = dict(declared) if isinstance(declared, dict) else {}
        for more in written:
            pairs |= more or {}
        # An anchor at either end of a whole name says nothing.
        pairs = {a.strip("^$"): b.strip("^$") for a, b in pairs.items()}
        plain = {a: b for a, b in pairs.items() if PLAIN_NAME.fullmatch(a) and PLAIN_NAME.fullmatch(b)}
        other |= len(plain) < len(pairs)
        ties = {"": plain} if plain else {}
        auto: dict[str, list[str]] = {}
        for attribute, (inner, config_path) in source.inner_models(cls).items():
            if inner in HEADED and config_path:
                auto[attribute] = [config_path, HEADED[inner]]
            inner_class = self._inner_class(cls, inner, config_path)
            if inner_class is None or inner_class in above or inner_class is cls:
                continue
            more_ties, more_auto, more_other = self._ties(inner_class, (*above, cls))
            other |= more_other
            for path, names in more_ties.items():
                group = ties.setdefault(_joined(config_path, path), {})
                group |= {
                    _joined(attribute, a): _joined(attribute, b)
                    for a, b in names.items()
                    if _joined(attribute, a) not in group
                }
            auto |= {_joined(attribute, a): [_joined(config_path, path), head] for a, (path, head) in more_auto.items()}
        return ties, auto, other

    def _inner_class(self, cls: type, inner: str, config_path: str) -> type | None:
        """The class of a model inside `cls`, as far as its source and default config tell."""
        if inner in HEADLESS:
            sub = sub_configs(cls.config_class).get(config_path)
            inner = _first(HEADLESS[inner].get(sub[1], "")) if sub else ""
        elif inner in HEADED and not config_path:
            inner = next(iter(self._head_classes(cls.config_class.model_type)), "")
        return self.by_name.get(inner)

    def _head_classes(self, model_type: str) -> list[str]:
        named = (_first(head.get(model_type, "")) for head in self.heads)
        return [name for name in named if name in self.by_name]

    def default_of(self, model_type: str) -> dict[str, str]:
        """The class that a config.json without `architectures` stands for, and the one for generation where that is
        another; a class of another model type only if need be."""
        names = self._head_classes(model_type)
        own = [name for name in names if self.by_name[name].config_class.model_type == model_type]
        if not names:
            return {}
        default = (own or names)[0]
        causal = _first(getattr(modeling_auto, CAUSAL_HEAD).get(model_type, ""))
        return {"default": default} | ({"causal": causal} if causal in own and causal != default else {})

    def type_row(self, names: list[str]) -> dict[str, Any]:
        """What the classes `names` of one model type share: most common prefix, rule of the tie flag, experts,
        Conv1D modules."""
        if not names:
            return {}
        prefixes = Counter(self.by_name[name].base_model_prefix for name in names)
        base = min(prefixes, key=lambda prefix: (-prefixes[prefix], prefix))
        config_class = self.by_name[names[0]].config_class
        rule = config_rule(config_class)
        named = {rule.get("or"), rule["tie"]} & sub_configs(config_class).keys()
        rule |= {"subs": {name: sub_configs(config_class)[name][1] for name in sorted(named)}} if named else {}
        parts = [(source, source.reachable(cls)) for source, cls in map(self._source, names)]
        experts = [found for source, reached in parts if (found := source.experts(reached))]
        rule |= {"experts": experts[0]} if experts else {}
        conv1d = set().union(*(source.conv1d(reached) for source, reached in parts))
        return {"base": base, "classes": names, **rule, **({"conv1d": sorted(conv1d)} if conv1d else {})}

    def sub_types(self, name: str, entry: dict[str, Any]) -> dict[str, str]:
        """The model types that the sub-configs named in `entry` have where a config.json does not say."""
        subs = sub_configs(self.by_name[name].config_class)
        paths = [*entry.get("ties", {}), *(path for path, _ in entry.get("auto", {}).values())]
        return {path: subs[path][1] for path in paths if path in subs}

    def _source(self, name: str) -> tuple[ModelingSource, type]:
        return self.sources[self.by_name[name].__module__], self.by_name[name]


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _first(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else names[0]


def table(families: Collection[str] = ()) -> dict[str, Any]:
    """The whole file: `meta`, a row per model type, a row per class that differs from its model type's others. With
    `families`, the rows of those packages only."""
    classes = Classes(families)
    members: dict[str, list[str]] = {}
    for name, cls in classes.by_name.items():
        members.setdefault(cls.config_class.model_type, []).append(name)
    types: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for model_type in sorted(members.keys() | {key for head in classes.heads for key in head}):
        names, default = members.get(model_type, []), classes.default_of(model_type)
        if names or default:
            types[model_type] = classes.type_row(names) | default
        for name in names:
            prefix = classes.by_name[name].base_model_prefix
            entry = classes.entry(name) | ({"base": prefix} if prefix != types[model_type]["base"] else {})
            if entry:
                rows[name] = entry
                subs = types[model_type].get("subs", {}) | classes.sub_types(name, entry)
                types[model_type] |= {"subs": subs} if subs else {}
    return {"meta": {"transformers": transformers.__version__, "format": FORMAT}, "model_types": types, "classes": rows}


def rendered(content: dict[str, Any]) -> bytes:
    """`content` with one line per model type and class."""
    lines = ["{", f'"meta": {_compact(content["meta"])},']
    for section in ("model_types", "classes"):
        rows = [f"{_compact(key)}: {_compact(value)}" for key, value in sorted(content[section].items())]
        lines += [
            f'"{section}": {{',
            *(f"{row}," for row in rows[:-1]),
            rows[-1],
            "}," if section == "model_types" else "}",
        ]
    return ("\n".join([*lines, "}"]) + "\n").encode("ascii")


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def main() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    made = rendered(table())
    if "--check" in sys.argv[1:]:
        sys.exit(TARGET.read_bytes() != made and f"{TARGET} is not what transformers {transformers.__version__} gives")
    TARGET.write_bytes(made)


if __name__ == "__main__":
    main()
