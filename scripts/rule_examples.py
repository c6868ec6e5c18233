"""Writes tests/names/rule_examples.json: for every rule of the conversion table a stored name that it acts on.

What a stored name becomes is taken from transformers alone, from the rules and the loading code that it has for a model
without weights (meta_models.py); streammerge's own engine has no say in it. A rule is shown by the first class, in the
order of names, that stores a tensor it acts on; then by the configs of rule_configs.py and by the old spellings there.
Models that hold another one inside than by default show theirs again. Takes minutes. Run: python
scripts/rule_examples.py [--check]; it lists the rules and keys it found nothing for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

import meta_models
from check_names import ends, spellings
from generate_conversions import compact, registry_sections, transform_row
from rule_configs import CONFIGS, OLD_SPELLINGS, SWAPPED
from transformers import conversion_mapping
from transformers.core_model_loading import GroupWeightRename, dot_natural_key

TARGET = Path(__file__).parents[1] / "tests" / "names" / "rule_examples.json"
IDENTITY = ("re", "to", "ops", "offset")

Wanted = tuple[str, int]
"""What an example is for: a transform as one line of JSON with the number of a source pattern in it; or, with
WHOLE_KEY, a registry key, of which one rule at least has to act; or, with IN_ANOTHER, a rule inside a swapped model."""
WHOLE_KEY, IN_ANOTHER = -1, -2


class Traced(meta_models.Loading):
    """Loading that tells which rules act on a name; `labels` are the registry key and the number of each, by id."""

    def __init__(self, model: Any) -> None:
        self.labels: dict[int, str] = {}
        asked = conversion_mapping.get_checkpoint_conversion_mapping

        def recorded(key: str) -> Any:
            found = asked(key)
            self.labels |= {id(transform): f"{key}[{number}]" for number, transform in enumerate(found or ())}
            return found

        with mock.patch.object(conversion_mapping, "get_checkpoint_conversion_mapping", recorded):
            super().__init__(model, set(model.state_dict()))
        self.class_name, self.model_type = type(model).__name__, model.config.model_type
        self.inside = [
            (path, where, inner.config.model_type)
            for path, inner in model.named_modules()
            if isinstance(inner, transformers.PreTrainedModel)
            and (where := meta_models.config_path(model.config, inner.config))
        ]
        self.rows = {id(transform): compact(transform_row(transform)) for transform in self.transforms}

    def wanted(self) -> set[Wanted]:
        """All that this model may show."""
        rules = {
            (self.rows[id(transform)], number)
            for transform in self.transforms
            for number in range(len(transform.source_patterns))
        }
        return rules | {(key_of(self.labels[id(transform)]), WHOLE_KEY) for transform in self.transforms}

    def acting(self, stored: str) -> tuple[str, list[tuple[str, int, str]]]:
        """What `stored` is loaded into, and the rules that act on the name: transform, source pattern and label. None
        where transformers undoes what they do, so that the name stays as it was."""
        name, hits = stored, []
        for transform in (*self.renamings, *self.converters):
            before = name
            name, source = transform.rename_source_key(name)
            converts = transform in self.converters
            if source is not None and (converts or name != before):
                number = transform.source_patterns.index(source)
                hits.append((self.rows[id(transform)], number, self.labels[id(transform)]))
                if converts:
                    break
        found, base = self.name_of(stored), f"{self.base}."
        kept = found != stored and found in (name, base + name, name.removeprefix(base))
        return found, hits if kept else []

    def config_for(self, name: str) -> dict[str, Any]:
        """As much of the config.json as says which models the parameter `name` is inside of."""
        config: dict[str, Any] = {"architectures": [self.class_name], "model_type": self.model_type}
        for path, where, model_type in self.inside:
            if name.startswith(f"{path}."):
                part = config
                for step in where.split("."):
                    part = part.setdefault(step, {})
                part["model_type"] = model_type
        return config

    def restart(self) -> None:
        """Forgets the names seen so far: a group of renames waits for its first one again."""
        for transform in self.transforms:
            if isinstance(transform, GroupWeightRename):
                transform._active = None


def key_of(label: str) -> str:
    """The registry key in `key[number]`."""
    return label.partition("[")[0]


# --- examples --------------------------------------------------------------------------------------------------------
def examples() -> dict[Wanted, dict[str, Any]]:
    """The first example of everything that any model or old spelling shows."""
    found: dict[Wanted, dict[str, Any]] = {}
    for model, by_hand in subjects():
        loading = Traced(model)
        if not loading.wanted() <= found.keys():
            for wanted, example in _shown(loading, [by_hand] if by_hand else _stored(model)):
                # What an old spelling by hand becomes may be a parameter that only a quantised model has.
                if by_hand or example["name"] in loading.known:
                    found.setdefault(wanted, example)
    classes = meta_models.concrete_classes()
    for number, (name, fields) in enumerate(SWAPPED):
        model = built(classes[name], fields)
        loading = Traced(model)
        for _, example in _shown(loading, _stored(model)):
            if example["name"] in loading.known:
                found.setdefault((f"{number} {example['rule']}", IN_ANOTHER), example)
    return found


def subjects() -> Iterator[tuple[Any, list[str]]]:
    """Models, with the names to try where they are not those that saving writes."""
    for _, model in meta_models.models():
        yield model, []
    classes = meta_models.concrete_classes()
    for name, fields in CONFIGS:
        yield built(classes[name], fields), []
    for name, fields, stored in OLD_SPELLINGS:
        yield built(classes[name], fields), list(stored)


def built(cls: type, fields: dict[str, Any]) -> Any:
    """A model of `cls` with another config than that of meta_configs.py."""
    with mock.patch.dict(meta_models.FIELDS, {cls.__name__: fields}), meta_models._without_missing_packages():
        return meta_models.built(cls)


def _stored(model: Any) -> Iterator[list[str]]:
    for kind, stored in spellings(model, ends(dict(model.state_dict()))):
        if kind != "own":
            yield stored


def _shown(loading: Traced, spelt: Iterable[list[str]]) -> Iterator[tuple[Wanted, dict[str, Any]]]:
    """What the names of a checkpoint show, for each of its spellings: taken one after the other as loading does."""
    for names in spelt:
        guards: dict[str, str] = {}
        loading.restart()
        for stored in sorted(names, key=dot_natural_key):
            name, hits = loading.acting(stored)
            for row, number, label in hits:
                if number == 0:
                    guards.setdefault(label, stored)
                example = {"rule": label, "source": number, "config": loading.config_for(name)}
                if number > 0 and json.loads(row)["kind"] == "group":
                    example["beside"] = guards[label]
                example |= {"row": row, "stored": stored, "name": name}
                yield (row, number), example
                yield (key_of(label), WHOLE_KEY), example


# --- the file --------------------------------------------------------------------------------------------------------
def rendered(found: dict[Wanted, dict[str, Any]], pool: list[dict[str, Any]]) -> bytes:
    """One line per example, in the order of the table; a transform is named by its content."""
    order = {compact(row): number for number, row in enumerate(pool)}
    rows = {}
    for example in found.values():
        row = json.loads(example["row"])
        identity = {key: row[key] for key in IDENTITY if key in row}
        line = compact({key: value for key, value in example.items() if key != "row"} | identity)
        rows[line] = (order[example["row"]], example["source"], line)
    return ("[\n" + ",\n".join(sorted(rows, key=rows.__getitem__)) + "\n]\n").encode("ascii")


def main() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    sections = registry_sections()
    found = examples()
    made = rendered(found, sections["transforms"])
    wanted = [(compact(row), number) for row in sections["transforms"] for number in range(len(row["from"]))]
    for what, number in [*wanted, *((key, WHOLE_KEY) for key in sections["rules"])]:
        if (what, number) not in found:
            print(number, what)
    if "--check" in sys.argv[1:]:
        sys.exit(TARGET.read_bytes() != made and f"{TARGET} is not what transformers {transformers.__version__} gives")
    TARGET.write_bytes(made)


if __name__ == "__main__":
    main()
