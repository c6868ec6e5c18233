"""From the names on disk to those of the model: transformers' conversion rules, applied without a model.

Owns `conversions.json`, which scripts/generate_conversions.py makes from an installed transformers. Which rules hold,
and under which path, follows from the class and the sub-configs that config.json names. The invariant: a name is only
ever rewritten by a rule of the table, and every rule that fired is known by its key and number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.errors import MalformedInputError
from streammerge.names.architectures import Architecture, config_part, sibling
from streammerge.names.operators import OPERATORS

DATA = Path(__file__).with_name("conversions.json")
FORMAT = 1
HEADS = ("For", "LMHead", "Backbone")
"""What the part of a class name begins with that classes of several model types share."""
LEGACY = "legacy"
"""The key of old spellings that every model may be stored with."""
DIGITS = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True)
class Transform:
    """One rule: names that `pattern` finds get the target in place of what was found. `steps` are the operators of a
    conversion, empty for a rename; `offset` shifts an index; a `guarded` one acts only where its first source is."""

    key: str
    pattern: re.Pattern[str]
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    offset: int = 0
    guarded: bool = False

    def rewrite(self, name: str) -> tuple[str, int] | None:
        """The new name and the number of the source pattern that was found; None if none was."""
        found = self.pattern.search(name)
        if found is None:
            return None
        group = next(group for group, text in found.groupdict().items() if text is not None)
        source = int(group[1:])
        target = self.targets[source if self.guarded else 0]
        inner = self.pattern.groupindex[group] + 1
        if r"\1" in target:
            text = found.group(inner)
            if self.offset and not text.isdecimal():
                return None
            target = (str(int(text) + self.offset) if self.offset else text).join(target.split(r"\1"))
        # As transformers does it: the first place with the same text changes, which need not be the one that was found.
        text = found.group(0)
        before, _, after = name.partition(text) if text else ("", "", name)
        return f"{before}{target}{after}", source


@dataclass(frozen=True, slots=True)
class Scoped:
    """A transform and the path it holds under: empty for all names, else a list of equal prefixes."""

    transform: Transform
    scopes: tuple[str, ...] = ()

    def rewrite(self, name: str) -> tuple[str, int] | None:
        """As `Transform.rewrite`, of what stands behind the scope; None outside of it."""
        if not self.scopes:
            return self.transform.rewrite(name)
        scope = next((scope for scope in self.scopes if name.startswith(scope)), None)
        found = self.transform.rewrite(name[len(scope) :]) if scope is not None else None
        return (f"{scope}{found[0]}", found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A name of the model, by the rules that fired; `converter` is the conversion the tensor takes part in, as its
    `source`-th kind of input and under the name `renamed`."""

    name: str
    rules: tuple[str, ...] = ()
    converter: Transform | None = None
    source: int = 0
    renamed: str = ""


class Conversions:
    """The rules of one config, in order. `fixed` are names, indices as `#`, that are the model's already; `stored` are
    the names of the checkpoint, which decide whether guarded rules act."""

    def __init__(self, scoped: Sequence[Scoped], fixed: frozenset[str], stored: Iterable[str]) -> None:
        self.fixed = fixed
        guarded = [rule for rule in scoped if rule.transform.guarded]
        names = list(stored) if guarded else []
        idle = [rule for rule in guarded if not any((hit := rule.rewrite(name)) and hit[1] == 0 for name in names)]
        self.renames = [rule for rule in scoped if not rule.transform.steps and rule not in idle]
        self.converters = [rule for rule in scoped if rule.transform.steps]
        self._any_rename = _any_of(self.renames)

    def rewrite(self, name: str) -> Rewritten:
        """A name on disk as the model's name: every rename that finds something, in order, then one conversion."""
        if self.fixed and DIGITS.sub("#", name) in self.fixed:
            return Rewritten(name)
        fired: list[str] = []
        none = self._any_rename is not None and self._any_rename.search(name) is None
        for rule in () if none else self.renames:
            hit = rule.rewrite(name)
            if hit and hit[0] != name:
                name = hit[0]
                fired.append(rule.transform.key)
        for rule in self.converters:
            hit = rule.rewrite(name)
            if hit:
                return Rewritten(hit[0], (*fired, rule.transform.key), rule.transform, hit[1], name)
        return Rewritten(name, tuple(fired))


def _any_of(rules: Sequence[Scoped]) -> re.Pattern[str] | None:
    """A pattern that finds something wherever one of the rules does; None where some hold under a path only."""
    if not rules or any(rule.scopes for rule in rules):
        return None
    return re.compile("|".join("(?:".join(re.split(r"\(\?P<g\d+>", rule.transform.pattern.pattern)) for rule in rules))


@dataclass(frozen=True, slots=True)
class Node:
    """A model inside a model: its module path, class and model type, and whether the config put it in the place of the
    one that the table has there."""

    path: str
    class_name: str
    model_type: str
    replaced: bool = False


class Table:
    """The rules of a file: transforms by registry key, models inside models by class, what AutoModel builds."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        if content["meta"]["format"] != FORMAT:
            raise ValueError(f"its format is {content['meta']['format']}, this is {FORMAT}")
        self.version: str = content["meta"]["transformers"]
        self.keys: Mapping[str, Sequence[int]] = content["rules"]
        self._pool: Sequence[Mapping[str, Any]] = content["transforms"]
        self._classes: Mapping[str, Any] = content["classes"]
        self._auto: Mapping[str, str] = content["auto"]
        if not all(isinstance(section, Mapping) for section in (self.keys, self._classes, self._auto)):
            raise ValueError("rules, classes and auto are objects")

    def check(self) -> None:
        """Look at every row. Raises ValueError, or what Python raises for data of another kind."""
        for rule in (rule for key in self.keys for rule in self.transforms(key)):
            groups, count = set(rule.pattern.groupindex), len(rule.sources)
            inner = any(r"\1" in target for target in rule.targets)
            if groups != {f"g{number}" for number in range(count)} or rule.pattern.groups < count + inner:
                raise ValueError(f"the pattern of {rule.key} lacks a group")
            if not rule.targets or (rule.guarded and len(rule.targets) != count):
                raise ValueError(f"{rule.key} lacks a target")
            unknown = {name for name, _ in rule.steps} - OPERATORS.keys()
            if unknown:
                raise ValueError(f"it has the unknown operator {min(unknown)}")
        for row in self._classes.values():
            for path, _, _, where in row.get("subs", ()):
                _joined(path, *where.split("."))

    def transforms(self, key: str) -> Iterator[Transform]:
        """The rules under a registry key, in order. Patterns are compiled here: nobody needs all of them."""
        for number, at in enumerate(self.keys.get(key, ())):
            row = self._pool[at]
            yield Transform(
                key=f"{key}[{number}]",
                pattern=re.compile(row["re"]),
                sources=tuple(row["from"]),
                targets=tuple(row["to"]),
                steps=tuple((name, arguments) for name, arguments in row.get("ops", ())),
                offset=row.get("offset", 0),
                guarded=row["kind"] == "group",
            )

    def conversions(
        self, architecture: Architecture | None, config: Mapping[str, Any], stored: Iterable[str]
    ) -> Conversions:
        """The rules for a config and its architecture; where that is not known, those under the names in the config."""
        scoped = [Scoped(transform) for transform in self.transforms(LEGACY)]
        root = _root(architecture, config)
        nodes = (root, *self._inside(root.class_name, config, ""))
        # What stands inside another model than tabulated brings its own names that are the model's already.
        fixed = {
            _joined(node.path, name)
            for node in nodes
            if node is root or node.replaced
            for name in self._classes.get(node.class_name, {}).get("fixed", ())
        }
        prefix = architecture.base_prefix if architecture else ""
        return Conversions([*self._scoped(prefix, nodes), *scoped], frozenset(fixed), stored)

    def _scoped(self, base_prefix: str, nodes: Iterable[Node]) -> Iterator[Scoped]:
        """As transformers collects them: every model inside the model is looked up by class, then by model type, unless
        one around it has claimed the same rules."""
        claimed: dict[str, list[str]] = {}
        for node in nodes:
            if _is_inside(node.path, claimed.get(node.class_name, ())):
                continue
            key = node.class_name if node.class_name in self.keys else node.model_type
            if key not in self.keys or (key != node.class_name and _is_inside(node.path, claimed.get(key, ()))):
                continue
            scopes = _scopes(node.path, base_prefix)
            yield from (Scoped(transform, scopes) for transform in self.transforms(key))
            for name in {node.class_name, key}:
                claimed.setdefault(name, []).append(node.path)

    def _inside(self, class_name: str, config: Mapping[str, Any], path: str) -> Iterator[Node]:
        """The models inside a class whose config is `config`, in the order of its modules. Where the config names
        another model type than the class was tabulated with, what is built for that one stands there instead."""
        replaced: list[str] = []
        for below, inner, model_type, where in self._classes.get(class_name, {}).get("subs", ()):
            if _is_inside(below, replaced):
                continue
            part = config_part(config, tuple(where.split(".")) if where else ())
            named = part.get("model_type", model_type) if where else model_type
            other = self._other_class(inner, model_type, named)
            yield Node(_joined(path, below), other or inner, named, other is not None)
            if other:
                replaced.append(below)
                yield from self._inside(other, part, _joined(path, below))

    def _other_class(self, class_name: str, model_type: str, named: str) -> str | None:
        """The class for model type `named` where `class_name` is the one for `model_type`, or None for the same."""
        if named == model_type:
            return None
        if self._auto.get(model_type) == class_name:
            return self._auto.get(named)
        head = next((class_name[at:] for word in HEADS if (at := class_name.rfind(word)) > 0), None)
        return sibling(named, head) if head else None


@functools.cache
def shipped() -> Table:
    """The table that comes with the package."""
    return load(DATA)


def load(path: Path) -> Table:
    """The table in a file. Raises MalformedInputError where it is not one."""
    content = strict_json.loads(io.read_file(path, strict_json.MAX_BYTES), str(path))
    try:
        return Table(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_table(path, error) from error


def load_checked(path: Path) -> Table:
    """A user's own table, every rule of which is looked at. Raises MalformedInputError."""
    table = load(path)
    try:
        table.check()
    except (KeyError, TypeError, IndexError, ValueError, AttributeError, re.error) as error:
        raise _no_table(path, error) from error
    return table


def _no_table(path: Path, error: Exception) -> MalformedInputError:
    said = (
        str(error)
        if isinstance(error, ValueError | re.error)
        else "a section or a field is missing, or of another kind"
    )
    reason = f"it is not a table of conversion rules: {said}"
    return MalformedInputError(str(path), reason, "`scripts/generate_conversions.py` writes one for a transformers")


def _root(architecture: Architecture | None, config: Mapping[str, Any]) -> Node:
    """The model itself; one that transformers does not have goes by the names in its config."""
    if architecture is not None:
        return Node("", architecture.name, architecture.model_type)
    names, model_type = config.get("architectures"), config.get("model_type")
    first = names[0] if isinstance(names, list) and names else None
    return Node("", first if isinstance(first, str) else "", model_type if isinstance(model_type, str) else "")


def _scopes(path: str, base_prefix: str) -> tuple[str, ...]:
    """The prefixes of names that a model at `path` owns: with and without the base-model prefix."""
    if not path:
        return ()
    scope = path.removeprefix(base_prefix).removeprefix(".")
    inner, base = f"{scope}." if scope else "", f"{base_prefix}." if base_prefix else ""
    return (base + inner, inner)


def _is_inside(path: str, others: Iterable[str]) -> bool:
    return any(not other or path.startswith(f"{other}.") for other in others)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)
