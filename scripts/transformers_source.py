"""Reads what transformers' modeling and configuration sources say but no class attribute does.

Only syntax trees are looked at: which models a class builds inside itself and with which part of the config, whether a
forward pass reads a config field, how expert parameters are registered. Nothing is executed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FLAG = "tie_word_embeddings"
_OWN_CONFIG = ""


class ModelingSource:
    """One modeling module: its classes as syntax trees."""

    def __init__(self, module: str) -> None:
        self.namespace = vars(sys.modules[module])
        tree = _tree(sys.modules[module])
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self._referred_by: dict[str, list[str]] = {}

    def reachable(self, cls: type) -> list[str]:
        """The classes of this module that `cls` inherits from or builds, at any depth."""
        pending, seen = [cls.__name__], []
        while pending:
            name = pending.pop()
            if name in seen or name not in self.classes:
                continue
            seen.append(name)
            pending += self._referred(name)
        return seen

    def _referred(self, name: str) -> list[str]:
        """The classes that the bases and the constructor of a class name, directly or through a table of classes."""
        if name not in self._referred_by:
            node = self.classes[name]
            parts = [*node.bases, *(method for method in _methods(node) if method.name == "__init__")]
            names = {inner.id for part in parts for inner in ast.walk(part) if isinstance(inner, ast.Name)}
            tables = [self.namespace[name] for name in names if isinstance(self.namespace.get(name), dict)]
            names |= {cls.__name__ for table in tables for cls in table.values() if isinstance(cls, type)}
            self._referred_by[name] = sorted(names & self.classes.keys())
        return self._referred_by[name]

    def forward_reads(self, names: list[str], fields: set[str]) -> bool:
        """Whether a `forward` of one of the classes reads an attribute called like one of `fields`."""
        return any(not fields.isdisjoint(_read_in_forward(self.classes[name])) for name in names)

    def built_ties(self, cls: type) -> list[dict[str, str] | None]:
        """The declarations of ties that the class writes while it is built; None for one that is computed."""
        pairs = (pair for node in ast.walk(self.classes[cls.__name__]) for pair in _assignments(node))
        return [_literal(value) for attribute, value in pairs if attribute == "_tied_weights_keys"]

    def inner_models(self, cls: type) -> dict[str, tuple[str, str]]:
        """Attributes that hold a model: its class (or `AutoModel...`) and the path of its config in this one's."""
        found: dict[str, tuple[str, str]] = {}
        for base in reversed(cls.__mro__):
            node = self.classes.get(base.__name__)
            init = next((m for m in _methods(node) if m.name == "__init__"), None) if node else None
            if init is None:
                continue
            if not any(isinstance(call, ast.Name) and call.id == "super" for call in ast.walk(init)):
                found.clear()
            aliases, local = _config_aliases(init), _local_calls(init)
            for statement in ast.walk(init):
                for attribute, value in _assignments(statement):
                    model = self._model(local.get(value.id, value) if isinstance(value, ast.Name) else value, aliases)
                    if model:
                        found[attribute] = model
                    else:
                        found.pop(attribute, None)
        return found

    def _model(self, value: ast.expr, aliases: dict[str, str]) -> tuple[str, str] | None:
        """The model that an expression builds, and the path of its config."""
        if not isinstance(value, ast.Call):
            return None
        function = value.func
        if isinstance(function, ast.Attribute) and function.attr in ("_from_config", "from_config"):
            function = function.value
        given = [*value.args, *(keyword.value for keyword in value.keywords if keyword.arg == "config")]
        if not isinstance(function, ast.Name) or not given:
            return None
        config_path = _config_path(given[0], aliases)
        known = function.id.startswith("AutoModel") or hasattr(self.namespace.get(function.id), "_tied_weights_keys")
        return (function.id, config_path) if known and config_path is not None else None

    def conv1d(self, names: list[str]) -> set[str]:
        """The attributes of the classes that hold a Conv1D, which stores its weight (in, out)."""
        return {attribute for name in names for attribute in _conv1d_attributes(self.classes[name])}

    def experts(self, names: list[str]) -> dict[str, Any]:
        """The parameters of each class of experts among the classes, in the order of registration, routed experts
        before shared ones, and whether the first of them lie (in, out)."""
        found = []
        for name in names:
            node = self.classes[name]
            params = _expert_parameters(node)
            routed = [d for d in node.decorator_list if "use_experts_implementation" in ast.unparse(d)]
            if params and (routed or "Expert" in name):
                found.append((not routed, name, params, any("is_transposed=True" in ast.unparse(d) for d in routed)))
        if not found:
            return {}
        orders = list(dict.fromkeys(tuple(params) for _, _, params, _ in sorted(found)))
        return {"params": orders, "transposed": min(found)[-1]}


def _literal(value: ast.expr) -> dict[str, str] | None:
    """A dictionary of names that stands in the source; nothing is what no ties are."""
    try:
        found = ast.literal_eval(value)
    except ValueError:
        return None
    return {} if found is None else found if isinstance(found, dict) else None


def handles_flag(config_class: type) -> bool:
    """Whether a config class has code about the tie flag, and not only a field for it."""
    own = [base for base in config_class.__mro__ if base.__module__.startswith("transformers.models.")]
    return any(_has_flag_code(base) for base in own)


@functools.cache
def _has_flag_code(cls: type) -> bool:
    return any(_mentions_flag(node) for method in _methods(_class_tree(cls)) for node in ast.walk(method))


def derived_from_flag(config_class: type) -> set[str]:
    """Config fields that a config class computes from the tie flag."""
    pairs = (pair for node in ast.walk(_class_tree(config_class)) for pair in _assignments(node))
    fields = {attribute for attribute, value in pairs if any(_mentions_flag(part) for part in ast.walk(value))}
    return fields - {FLAG, *config_class.sub_configs}


def other_flags(config_class: type) -> set[str]:
    """Names like the flag's that a config class reads."""
    words = {node.value for node in ast.walk(_class_tree(config_class)) if isinstance(node, ast.Constant)}
    words |= set(inspect.get_annotations(config_class))
    return {word for word in words if isinstance(word, str) and word.startswith("tie_") and word.isidentifier()} - {
        FLAG
    }


def _mentions_flag(node: ast.AST) -> bool:
    return FLAG in (getattr(node, "attr", None), getattr(node, "value", None), getattr(node, "arg", None))


@functools.cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))


def _class_tree(cls: type) -> ast.ClassDef:
    tree = _tree(sys.modules[cls.__module__])
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [part for part in node.body if isinstance(part, ast.FunctionDef)]


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """`self.X = value` as (X, value); of a conditional expression both branches."""
    if not isinstance(node, ast.Assign):
        return
    values = [node.value.orelse, node.value.body] if isinstance(node.value, ast.IfExp) else [node.value]
    for target in node.targets:
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            for value in values:
                yield target.attr, value


def _config_aliases(init: ast.FunctionDef) -> dict[str, str]:
    """Local names for parts of the config."""
    aliases = {"config": _OWN_CONFIG}
    for node in ast.walk(init):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "config":
            path = _config_path(node.value, aliases)
            if path is not None:
                aliases[node.targets[0].id] = path
    return aliases


def _local_calls(init: ast.FunctionDef) -> dict[str, ast.Call]:
    """Local names for what a call returns."""
    assigned = [node for node in ast.walk(init) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
    return {t.id: node.value for node in assigned for t in node.targets if isinstance(t, ast.Name)}  # type: ignore[misc]


def _config_path(value: ast.expr, aliases: dict[str, str]) -> str | None:
    """The dotted path that an expression takes from the config, or None."""
    if isinstance(value, ast.Name):
        return aliases.get(value.id)
    if isinstance(value, ast.Call):
        copied = ast.unparse(value.func) in ("copy.deepcopy", "deepcopy", "copy.copy") and value.args
        return _config_path(value.args[0], aliases) if copied else None
    if isinstance(value, ast.Attribute):
        if ast.unparse(value) == "self.config":
            return _OWN_CONFIG
        path = _config_path(value.value, aliases)
        return None if path is None else f"{path}.{value.attr}".strip(".")
    return None


@functools.cache
def _read_in_forward(node: ast.ClassDef) -> frozenset[str]:
    """The attributes that the class reads in its `forward`."""
    forward = [method for method in _methods(node) if method.name == "forward"]
    return frozenset(part.attr for method in forward for part in ast.walk(method) if isinstance(part, ast.Attribute))


@functools.cache
def _conv1d_attributes(node: ast.ClassDef) -> frozenset[str]:
    pairs = (pair for part in ast.walk(node) for pair in _assignments(part))
    calls = ((attribute, value.func) for attribute, value in pairs if isinstance(value, ast.Call))
    return frozenset(attribute for attribute, func in calls if isinstance(func, ast.Name) and func.id == "Conv1D")


@functools.cache
def _expert_parameters(node: ast.ClassDef) -> list[str]:
    """Attributes that are set to `nn.Parameter(torch.empty(experts, rows, columns))`, in order; of experts that lie one
    below the other, `(experts * rows, columns)`."""
    found = []
    for attribute, value in (pair for part in ast.walk(node) for pair in _assignments(part)):
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "nn.Parameter" and value.args:
            inner = value.args[0]
            sizes = inner.args if isinstance(inner, ast.Call) else []
            if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple):
                sizes = sizes[0].elts
            if len(sizes) == 3 or (
                len(sizes) == 2 and "experts" in ast.unparse(sizes[0]) and "*" in ast.unparse(sizes[0])
            ):
                found.append(attribute)
    return list(dict.fromkeys(found))
