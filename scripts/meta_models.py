"""Models of transformers without weights: which models each holds inside, and which of its names the rules would spoil.

Every class is built on the meta device with the config that meta_configs.py gives it; packages that transformers wraps
and that may be missing are stood in for, so that the result depends on the version of transformers alone. A class that
cannot be built, or not in time, is an error unless meta_configs.UNBUILT names it.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType, SimpleNamespace
from typing import Any

import torch
import transformers
from generate_architectures import concrete_classes
from meta_configs import FIELDS, UNBUILT
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.initialization import no_init_weights

SECONDS_PER_CLASS = 120
INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


# --- building --------------------------------------------------------------------------------------------------------
def models() -> Iterator[tuple[str, Any]]:
    """Every class by name with a model of it on the meta device, in the order of their names.

    Raises RuntimeError, naming all of them, for classes that could not be built and should have been.
    """
    classes = concrete_classes()
    failed = {}
    with _without_missing_packages():
        for name, cls in classes.items():
            if name in UNBUILT:
                continue
            try:
                model = built(cls)
            except Exception as error:  # every class has its own way to refuse a config
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            yield name, model
    if failed:
        raise RuntimeError("\n".join(f"{name}: {reason}" for name, reason in failed.items()))


def built(cls: type) -> Any:
    """A model of `cls` without weights. Raises TimeoutError after SECONDS_PER_CLASS."""
    fields = FIELDS.get(cls.__name__, FIELDS.get(cls.config_class.model_type, {}))
    with _time_limit(), torch.device("meta"), no_init_weights():
        return cls(cls.config_class(**fields))


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not built in {SECONDS_PER_CLASS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_PER_CLASS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Backbone(torch.nn.Module):
    """Stands in for a model of timm: five stages, one parameter."""

    def __init__(self, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = torch.nn.Linear(8, 8)
        self.num_features = 8
        stages = [{"module": f"stage{i}", "index": i, "num_chs": 8, "reduction": 2**i} for i in range(5)]
        self.feature_info = SimpleNamespace(
            info=stages,
            out_indices=out_indices,
            get_dicts=lambda *_: stages,
            channels=lambda *_: [8 for _ in out_indices],
            module_name=lambda *_: [stages[i]["module"] for i in out_indices],
        )


@contextlib.contextmanager
def _without_missing_packages() -> Iterator[None]:
    """No class asks for a package it needs only to run, and timm is stood in for."""
    timm = SimpleNamespace(create_model=lambda *_, out_indices=(4,), **__: _Backbone(tuple(out_indices)))
    undo = []
    for name, module in sorted(sys.modules.items()):
        if not name.startswith("transformers.models."):
            continue
        given = {"requires_backends": lambda *_: None} if "requires_backends" in vars(module) else {}
        if name.endswith((".modeling_timm_wrapper", ".modeling_timm_backbone")):
            given["timm"] = timm
        for attribute, value in given.items():
            undo.append((module, attribute, vars(module).get(attribute)))
            setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, value in undo:
            setattr(module, attribute, value)


# --- rows ------------------------------------------------------------------------------------------------------------
def class_rows(rules: dict[str, Any]) -> dict[str, Any]:
    """The section `classes`: `subs` and `fixed` of every class for which either says anything.

    A model inside is left out of `subs` where it has the config of the whole, so that no config.json replaces it, and
    neither its class nor its model type has rules: such a model adds no rule, and it claims none for what is below
    it. `fixed` holds names with every index written as `#`.
    """
    rows = {}
    for name, model in models():
        row = {"subs": inner_models(model, rules), "fixed": fixed_names(model)}
        if any(row.values()):
            rows[name] = {key: value for key, value in row.items() if value}
    return rows


def inner_models(model: Any, rules: dict[str, Any]) -> list[list[str]]:
    """The models inside `model` that may bring rules: path, class, model type and the path of the config in that of
    the whole, in the order of the modules, which is that in which transformers asks them for rules."""
    found = []
    for path, inner in model.named_modules():
        if path and isinstance(inner, transformers.PreTrainedModel):
            name, model_type = type(inner).__name__, inner.config.model_type
            where = config_path(model.config, inner.config)
            if where or name in rules or model_type in rules:
                found.append([path, name, model_type, where])
    return found


def config_path(outer: Any, inner: Any) -> str:
    """Where `inner` stands in `outer`, dotted: itself if it is there, else what is of its class, as models may copy
    their config; "" for `outer` itself and for a config that is nowhere."""
    parts = list(_parts(outer, ""))
    for path, part in parts:
        if part is inner:
            return path
    return next((path for path, part in parts if type(part) is type(inner)), "")


def _parts(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, transformers.PreTrainedConfig) and not name.startswith("_"):
            yield from _parts(value, f"{path}.{name}" if path else name)


def fixed_names(model: Any) -> list[str]:
    """The names that transformers leaves as they are when it loads `model`, since the model has them, though the rules
    alone would change them: its own names, with and without the base-model prefix, indices as `#`.

    Raises ValueError where the rules treat two names differently that differ in their indices only.
    """
    fixed, others = set(), set()
    names = sorted(model.state_dict(), key=dot_natural_key)
    base = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for spelt in (names, [name.removeprefix(base) for name in names]):
        changed = _changed(Loading(model, set()), spelt)
        kept = changed - _changed(Loading(model, set(names)), spelt) if changed else changed
        fixed |= {INDEX.sub("#", name) for name in kept}
        others |= {INDEX.sub("#", name) for name in spelt if name not in kept}
    if fixed & others:
        raise ValueError(f"{type(model).__name__}: indices decide about {sorted(fixed & others)}")
    return sorted(fixed)


def _changed(loading: Loading, names: list[str]) -> set[str]:
    """What loading does not find under its own name, with or without the base-model prefix."""
    base = f"{loading.base}." if loading.base else ""
    return {name for name in names if loading.name_of(name).removeprefix(base) != name.removeprefix(base)}


class Loading:
    """What loading makes of names on disk, for a model that has the parameters `names`; with none, the rules alone."""

    def __init__(self, model: Any, names: set[str]) -> None:
        self.transforms = get_model_conversion_mapping(model)
        self.renamings = [transform for transform in self.transforms if isinstance(transform, WeightRenaming)]
        self.converters = [transform for transform in self.transforms if isinstance(transform, WeightConverter)]
        self.base = model.base_model_prefix
        self.known = dict.fromkeys(names, True)

    def name_of(self, stored: str) -> str:
        """The name that is looked for in the model; of several that a tensor is split into, the first."""
        return self.found(stored)[0]

    def found(self, stored: str) -> tuple[str, str | None]:
        """The same, and the source pattern of the conversion that the tensor takes part in."""
        found = rename_source_key(stored, self.renamings, self.converters, self.base, self.known)
        if found[0] not in self.known and stored in self.known:
            return rename_source_key(stored, [], [], self.base, self.known)
        return found
