"""Fields of an `adapter_config.json`, whatever its type: which are known, and what each may hold.

Every field is known as one of three kinds: it is read, it is of no consequence to the weights, or it must be neutral
because what it switches on is not merged. A field that is none of these and is set is refused: it may change the
mathematics, and PEFT would ignore it (as of PEFT 0.21.2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from streammerge.core.errors import (
    ConfigContradictionError,
    NonFiniteError,
    NotMergeableError,
    UnknownFieldError,
    UsageError,
)
from streammerge.core.text import printable
from streammerge.methods.patterns import Patterns

READ = frozenset(
    {"peft_type", "peft_version", "task_type", "target_modules", "modules_to_save", "fan_in_fan_out", "bias"}
)
"""Fields that are read for every type."""
NO_CONSEQUENCE = frozenset(
    {
        "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "exclude_modules", "layers_pattern",
        "layers_to_transform", "runtime_config",
    }
)  # fmt: skip
"""Training-time choices that every type has: which modules were adapted, the file's keys say."""


@dataclass(frozen=True, slots=True)
class Known:
    """The fields of one type beside those that every type has: `read`, of `no_consequence`, and those that must be
    `neutral`, each with what it would switch on."""

    read: frozenset[str] = frozenset()
    no_consequence: frozenset[str] = frozenset()
    neutral: Mapping[str, str] = field(default_factory=dict)

    def check(self, raw: Mapping[str, Any], ignored: Collection[str]) -> None:
        """Refuse what is switched on and not merged, and what is set and not known; but for what is `ignored`."""
        for name, reason in self.neutral.items():
            if is_set(raw.get(name)) and name not in ignored:
                raise NotMergeableError((name,), reason)
        known = READ | NO_CONSEQUENCE | self.read | self.no_consequence | self.neutral.keys() | set(ignored)
        unknown = tuple(name for name, value in raw.items() if is_set(value) and name not in known)
        if unknown:
            raise UnknownFieldError(
                unknown,
                "the adapter's config sets fields that streammerge does not know; "
                "they may change what the adapter means",
                f"if it does not matter to the weights: `--ignore-config-field {unknown[0]}`",
            )


@dataclass(frozen=True, slots=True)
class Common:
    """What the configs of all types say that a merge reads. `token_indices` are rows of the input embedding, or rows by
    the names of modules."""

    fan_in_fan_out: bool
    modules_to_save: tuple[str, ...]
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    task_type: str
    peft_version: tuple[int, ...] | None


def common(raw: Mapping[str, Any], only: str, tokens_in: str | None = None) -> dict[str, Any]:
    """The fields of `Common` by name. `only` is the type's own name for `bias="<tuner>_only"`, `tokens_in` the field
    with the rows of trained tokens, where the type has one."""
    if str(raw.get("bias") or "none").lower() not in ("none", "all", only):  # PEFT's documents spell one `MiSS_only`
        raise wrong("bias", raw["bias"], f"none, all or {only}")
    return {
        "fan_in_fan_out": flag(raw, "fan_in_fan_out"),
        "modules_to_save": names(raw, "modules_to_save"),
        "token_indices": tokens(tokens_in, raw.get(tokens_in)) if tokens_in else (),
        "task_type": str(raw.get("task_type") or ""),
        "peft_version": parse_version(raw.get("peft_version")),
    }


def parse_version(value: object) -> tuple[int, ...] | None:
    """`0.19.1` and `0.19.1.dev0@hash` as numbers; None where there is no version."""
    match = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", value) if isinstance(value, str) else None
    return tuple(int(part or 0) for part in match.groups()) if match else None


def with_version(raw: Mapping[str, Any], said: str) -> Mapping[str, Any]:
    """The config with the version that the user says wrote it, `auto` for nothing said.

    Raises UsageError for what is no version, ConfigContradictionError where the config names another one.
    """
    if said == "auto":
        return raw
    if parse_version(said) is None:
        raise UsageError(f"`--peft-version {printable(said)}` is not a version such as 0.15.2")
    own = raw.get("peft_version")
    if own is not None and parse_version(own) != parse_version(said):
        raise ConfigContradictionError((said,), f"the config says `peft_version` {own}, `--peft-version` says {said}")
    return {**raw, "peft_version": said}


def version_of(raw: Mapping[str, Any], about: str, matters: str) -> tuple[int, ...]:
    """The version of the PEFT that wrote a config, where it `matters` what that is `about`.

    Raises NotMergeableError where the config does not say it, as none before 0.18 does.
    """
    version = parse_version(raw.get("peft_version"))
    if version is None:
        reason = f"{about}: {matters}, and the config does not say which version wrote it"
        raise NotMergeableError(("peft_version",), reason, "say it: `--peft-version 0.15.2`")
    return version


def is_set(value: object) -> bool:
    """Whether a field says anything but its neutral value."""
    return value not in (None, False, "", 0) and value != [] and value != {}


def wrong(field: str, value: object, wanted: str) -> ConfigContradictionError:
    """The refusal of a value."""
    return ConfigContradictionError(
        (f"{field} = {value!r}",), f"the adapter's config holds a `{field}` that is not {wanted}"
    )


def checked(field: str, value: object, *, whole: bool) -> Any:
    """A finite number, or a whole one of at least 1. Raises ConfigContradictionError or NonFiniteError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(field, value, "a number")
    if not math.isfinite(value):
        raise NonFiniteError((f"{field} = {value}",), f"the adapter's config holds a `{field}` that is not finite")
    if whole and (not float(value).is_integer() or value < 1):
        raise wrong(field, value, "a whole number of at least 1")
    return int(value) if whole else value


def number(raw: Mapping[str, Any], field: str, default: Any, *, whole: bool = False) -> Any:
    """A number, `default` where there is none."""
    value = raw.get(field)
    return default if value is None else checked(field, value, whole=whole)


def flag(raw: Mapping[str, Any], field: str, default: bool = False) -> bool:
    """true or false, `default` where there is nothing."""
    value = raw.get(field, default)
    if value not in (None, True, False):
        raise wrong(field, value, "true or false")
    return bool(value)


def pattern(raw: Mapping[str, Any], field: str, *, whole: bool = False) -> Patterns:
    """Numbers by patterns of module names."""
    value = raw.get(field) or {}
    if not isinstance(value, Mapping):
        raise wrong(field, value, "an object")
    return Patterns(field, {key: checked(f"{field}[{key}]", number, whole=whole) for key, number in value.items()})


def names(raw: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """A list of names; one name will do."""
    value = raw.get(field) or []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(field, value, "a list of names")
    return tuple(value)


def tokens(field: str, value: object) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    """Rows of the input embedding, or by the names of modules."""
    if not value:
        return ()
    if isinstance(value, Mapping):
        return MappingProxyType({str(name): _indices(field, indices) for name, indices in value.items()})
    return _indices(field, value)


def _indices(field: str, value: object) -> tuple[int, ...]:
    if isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value):
        if len(set(value)) != len(value):
            raise wrong(field, value, "a list of different rows")
        return tuple(value)
    raise wrong(field, value, "a list of rows")
