"""Compares the names that streammerge.names.conversions finds with those of transformers, class by class.

Every class that meta_models.py builds is turned back into the names of a checkpoint by transformers itself: as it saves
it, with the prefixes that a rule may have dropped, and with old spellings. What transformers makes of each such name
when it loads the class is the truth. Takes many minutes. Run: python scripts/check_names.py REPORT.json [CLASS...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import meta_models
from generate_conversions import compact, registry, transform_row
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from streammerge.names.architectures import architecture_of
from streammerge.names.conversions import shipped

FEW = 8


# --- what transformers does ------------------------------------------------------------------------------------------
def targets_of(loading: meta_models.Loading, stored: str) -> list[str]:
    """All parameters that a tensor goes into."""
    name, source = loading.found(stored)
    converters = [converter for converter in loading.converters if source in converter.source_patterns]
    if not converters:
        return [name]
    targets = converters[-1].target_patterns
    return [name.replace(targets[0], target) for target in targets]


def spellings(model: Any, state: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The names of `state` in a checkpoint, by kind of spelling."""
    rules = {
        "saved": None,
        "prefixed": get_model_conversion_mapping(model, add_legacy=False) or None,
        "old": get_model_conversion_mapping(model),
        "own": [],
    }
    for kind, transforms in rules.items():
        if transforms is not None:
            model._weight_conversions = transforms
        elif hasattr(model, "_weight_conversions"):
            del model._weight_conversions
        yield kind, sorted(revert_weight_conversion(model, state) if transforms != [] else state, key=dot_natural_key)


def ends(state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the first and the last of everything that is numbered, and all where they are few."""
    indices: dict[str, list[set[int]]] = {}
    numbers = {name: [int(part) for part in name.split(".") if part.isdigit()] for name in state}
    for name, found in numbers.items():
        places = indices.setdefault(meta_models.INDEX.sub("#", name), [set() for _ in found])
        for place, index in zip(places, found, strict=True):
            place.add(index)
    return {
        name: tensor
        for name, tensor in state.items()
        if all(
            index in (min(place), max(place)) or len(place) <= FEW
            for index, place in zip(numbers[name], indices[meta_models.INDEX.sub("#", name)], strict=True)
        )
    }


# --- the comparison --------------------------------------------------------------------------------------------------
def compared(name: str, model: Any) -> dict[str, Any]:
    """The report on one class: figures by spelling, differing names, parameters that nothing on disk goes into."""
    state = ends(dict(model.state_dict()))
    config = json.loads(json.dumps(model.config.to_dict(), default=str)) | {"architectures": [name]}
    architecture = architecture_of(config)
    if architecture is None:
        return {"unknown": True, "used": []}
    known = set(model.state_dict())
    report: dict[str, Any] = {"used": set()}
    for kind, stored in spellings(model, state):
        loading = meta_models.Loading(model, known)
        truth = {name: loading.name_of(name) for name in stored}
        engine = shipped().conversions(architecture, config, stored)
        made = {name: engine.rewrite(name).name for name in stored}
        base = f"{loading.base}." if loading.base else ""
        wrong = {
            name: [made[name], truth[name]]
            for name in stored
            if made[name].removeprefix(base) != truth[name].removeprefix(base)
        }
        reached = {target for name in stored for target in targets_of(loading, name)}
        report[kind] = {"names": len(stored), "wrong": wrong, "uncovered": sorted(state.keys() - reached)}
        used = [transform for transform in loading.transforms if transform.was_used()]
        report["used"] |= {compact(transform_row(transform)) for transform in used}
        report.setdefault("disk", set()).update(stored if kind in ("saved", "prefixed") else ())
    fixed = set(shipped()._classes.get(name, {}).get("fixed", ()))
    report["ambiguous"] = sorted({meta_models.INDEX.sub("#", stored) for stored in report.pop("disk")} & fixed)
    return report


def main() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    chosen = set(sys.argv[2:])
    if chosen:
        everything = meta_models.concrete_classes()
        meta_models.concrete_classes = lambda: {name: everything[name] for name in sorted(chosen)}
    reports: dict[str, Any] = {}
    used: set[str] = set()
    for name, model in meta_models.models():
        try:
            reports[name] = compared(name, model)
        except Exception as error:  # a class that transformers cannot save is a finding, not the end
            reports[name] = {"error": f"{type(error).__name__}: {error}", "used": set()}
        used |= set(reports[name].pop("used"))
    idle = {
        key: [row for row in map(compact, map(transform_row, transforms)) if row not in used]
        for key, transforms in registry().items()
    }
    Path(sys.argv[1]).write_text(json.dumps({"classes": reports, "idle": idle}, indent=1))
    for kind in ("saved", "prefixed", "old", "own"):
        parts = [report[kind] for report in reports.values() if kind in report]
        print(
            f"{kind}: {len(parts)} classes, {sum(part['names'] for part in parts)} names, "
            f"{sum(len(part['wrong']) for part in parts)} wrong, "
            f"{sum(len(part['uncovered']) for part in parts)} uncovered"
        )
    print(f"{sum('error' in report for report in reports.values())} errors")
    print(f"{len({row for rows in idle.values() for row in rows})} rules that no class used")


if __name__ == "__main__":
    main()
