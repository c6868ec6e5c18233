"""Writes streammerge/names/conversions.json: how transformers turns the names on disk into those of its models.

Needs the development dependency transformers. The registry of rules is read by importing it (seconds); what each class
holds comes from models without weights (meta_models.py, minutes). The output is a function of the installed version of
transformers alone. Run: python scripts/generate_conversions.py [--registry | --check]; `--registry` renews the rules
and keeps the classes that the file has.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import conversion_mapping, core_model_loading
from transformers.models.auto import modeling_auto

TARGET = Path(__file__).parents[1] / "streammerge" / "names" / "conversions.json"
FORMAT = 1
SECTIONS = ("transforms", "rules", "classes", "auto")
# Sizes that transformers takes from the parameters of the live model, by operator and target patterns: rows of every
# part, and the size along dimension 1 with which a tensor is not transposed. Letters of the text config: hid hidden
# size, H attention heads, KV key and value heads, D head dimension, I intermediate size (of an expert).
SIZES: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = {
    ("Split", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")): {"sizes": ["H*D", "KV*D", "KV*D"]},
    ("Transpose", ("mlp.experts.gate_up_proj",)): {"rows": "2*M"},
    ("Transpose", ("mlp.experts.down_proj",)): {"rows": "hid"},
}


# --- the registry ---------------------------------------------------------------------------------------------------
def registry() -> dict[str, list[Any]]:
    """The transforms of transformers by registry key: a model type, a class name, or `legacy`."""
    built = conversion_mapping._build_checkpoint_conversion_mapping()
    return dict(sorted(built.items()))


def registry_sections() -> dict[str, Any]:
    """The sections `transforms` and `rules`: distinct transforms in the order of first use by sorted key, and the
    indices of every key; and `auto`, the class that AutoModel builds for a model type, the default one of several."""
    pool: dict[str, int] = {}
    rules = {
        key: [pool.setdefault(compact(transform_row(transform)), len(pool)) for transform in transforms]
        for key, transforms in registry().items()
    }
    auto = {
        model_type: names if isinstance(names, str) else names[0]
        for model_type, names in modeling_auto.MODEL_MAPPING_NAMES.items()
    }
    return {"transforms": [json.loads(row) for row in pool], "rules": rules, "auto": auto}


def transform_row(transform: Any) -> dict[str, Any]:
    """One transform: the patterns as transformers searches with them, and the operators disk to runtime.

    Raises TypeError for a kind of transform that this generator does not know.
    """
    row: dict[str, Any] = {
        "kind": _kind(transform),
        "from": list(transform.source_patterns),
        "to": list(transform.target_patterns),
        "re": transform.compiled_sources.pattern,
    }
    if row["kind"] == "convert":
        row["ops"] = [_operator(op, row["to"]) for op in transform.operations]
    if row["kind"] == "offset":
        row["offset"] = transform.offset
    if isinstance(transform, core_model_loading.PrefixChange):
        row["prefix"] = True
    return row


def _kind(transform: Any) -> str:
    kinds = {
        core_model_loading.WeightRenaming: "rename",
        core_model_loading.PrefixChange: "rename",
        core_model_loading.WeightConverter: "convert",
        core_model_loading.GroupWeightRename: "group",
        core_model_loading.Inkling2IndexOffsetWeightRename: "offset",
    }
    if type(transform) not in kinds:
        raise TypeError(f"{type(transform).__name__} is a kind of transform that the table has no word for")
    return kinds[type(transform)]


def _operator(op: Any, targets: list[str]) -> list[Any]:
    """`[name, parameters]`, with the parameters that are not the defaults and the sizes kept by hand."""
    defaults = {name: field.default for name, field in inspect.signature(type(op).__init__).parameters.items()}
    changed = {name: value for name, value in vars(op).items() if value != defaults[name]}
    needs_model = type(op).__name__ == "Split" or getattr(op, "check_dims", False)
    sizes = SIZES[type(op).__name__, tuple(targets)] if needs_model else {}
    return [type(op).__name__, changed | sizes]


# --- the file -------------------------------------------------------------------------------------------------------
def table(classes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The whole file; with `classes`, that section as it is instead of a new one."""
    found = registry_sections()
    if classes is None:
        import meta_models

        classes = meta_models.class_rows(found["rules"])
    return {"meta": {"transformers": transformers.__version__, "format": FORMAT}, **found, "classes": classes}


def rendered(content: dict[str, Any]) -> bytes:
    """`content` with one line per transform, rule, class and model type."""
    sections = [f'"meta": {compact(content["meta"])}']
    sections += [f"{compact(name)}: {_section(content[name])}" for name in SECTIONS]
    return ("{\n" + ",\n".join(sections) + "\n}\n").encode("ascii")


def _section(content: Any) -> str:
    if isinstance(content, list):
        return _lines("[]", map(compact, content))
    return _lines("{}", (f"{compact(key)}: {compact(value)}" for key, value in sorted(content.items())))


def _lines(brackets: str, rows: Iterable[str]) -> str:
    return brackets[0] + "\n" + ",\n".join(rows) + "\n" + brackets[1]


def compact(value: Any) -> str:
    """`value` as JSON on one line, keys sorted."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def main() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    kept = json.loads(TARGET.read_bytes())["classes"] if "--registry" in sys.argv[1:] else None
    made = rendered(table(kept))
    if "--check" in sys.argv[1:]:
        sys.exit(TARGET.read_bytes() != made and f"{TARGET} is not what transformers {transformers.__version__} gives")
    TARGET.write_bytes(made)


if __name__ == "__main__":
    main()
