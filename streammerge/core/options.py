"""The options of a merge: one frozen dataclass, from whose fields the flags, the help and README's table are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from streammerge.core import machine
from streammerge.core.errors import UsageError
from streammerge.core.text import parse_size, printable, some_of

DEFAULT_MEMORY = 128 * 10**6
_KINDS = {str: "a text", int: "a whole number", bool: "true or false", tuple: "a list of texts"}


def _option(
    default: Any,
    help: str,
    *,
    metavar: str = "",
    short: str = "",
    choices: tuple[str, ...] = (),
    bytes_too: bool = True,
) -> Any:
    """A field with what the command line says of it. `bytes_too` marks options that change the output's bytes, which
    are part of a plan's fingerprint."""
    return field(
        default=default,
        metadata={"help": help, "metavar": metavar, "short": short, "choices": choices, "bytes": bytes_too},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a caller may choose. Raises UsageError for a value that makes no sense."""

    dtype: str = _option(
        "auto",
        "dtype of written float tensors; auto keeps each tensor's own",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    max_shard_size: str = _option(
        "keep", "keep writes the same files as the base; a size such as 5GB re-shards", metavar="keep|SIZE"
    )
    device: str = _option("auto", "where the arithmetic is done", metavar="auto|cpu|cuda[:N]", bytes_too=False)
    workers: int = _option(
        0, "parallel workers (default: the cores this process may use)", metavar="N", short="-j", bytes_too=False
    )
    memory: int = _option(
        DEFAULT_MEMORY,
        "working memory beyond the imported libraries: tiles, buffers, factors",
        metavar="SIZE",
        bytes_too=False,
    )
    read: str = _option(
        "auto",
        "how the base is read: mapped, by system calls, or by those past the page cache",
        choices=("auto", "mmap", "pread", "direct"),
        bytes_too=False,
    )
    io: str = _option(
        "auto",
        "how weights are written: past the page cache, or through it",
        choices=("auto", "direct", "buffered"),
        bytes_too=False,
    )
    accumulate: str = _option(
        "float64",
        "precision of the arithmetic; float32 is for very high ranks, and its bytes depend on the machine",
        choices=("float64", "float32"),
    )
    sha256: bool = _option(False, "record the SHA-256 of every file too, as the Hub and sha256sum have it")
    no_code: bool = _option(False, "leave out the base's Python files (`*.py`), which loaders may be told to run")
    overwrite: bool = _option(False, "replace an output that carries our marker", bytes_too=False)
    allow_unused: tuple[str, ...] = _option(
        (), "adapter keys that may be left over (repeatable); recorded", metavar="GLOB"
    )
    ignore_config_field: tuple[str, ...] = _option(
        (), "an adapter config field that is unknown and set, and may be ignored (repeatable); recorded", metavar="NAME"
    )

    expert_orientation: str = _option(
        "auto",
        "how the factors of square stacked experts lie, where the adapter does not tell: straight, or transposed",
        choices=("auto", "straight", "transposed"),
    )
    expert_packing: str = _option(
        "peft",
        "how B of stacked experts is packed: unsloth for adapters of Unsloth before September 2026",
        choices=("peft", "unsloth"),
    )
    peft_version: str = _option(
        "auto",
        "the PEFT that wrote the adapter, for a config that does not say it (before 0.18) where it matters",
        metavar="X.Y.Z",
    )
    rules: str = _option(
        "", "a table of conversion rules to use instead of the shipped one", metavar="FILE", bytes_too=False
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            kind: type = type(item.default)
            parts = value if isinstance(value, tuple) else ()
            if type(value) is not kind or not all(isinstance(part, str) for part in parts):
                raise UsageError(f"`{item.name}` is `{printable(value)}`, not {_KINDS[kind]}")
            if choices and value not in choices:
                raise UsageError(f"`{item.name}` is `{printable(value)}`, not one of {some_of(choices)}")
        if self.workers < 0:
            raise UsageError(f"`workers` is {self.workers}, not a count of threads")
        if self.memory <= 0:
            raise UsageError(f"`memory` is {self.memory}, not a number of bytes")
        self.shard_limit()
        if self.device not in ("auto", "cpu") and not self.device.startswith("cuda"):
            raise UsageError(f"`device` is `{printable(self.device)}`, not auto, cpu or cuda[:N]")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Options from keyword arguments: sizes may be text, single values stand for lists.

        Raises TypeError for a name that is no option, like any function would.
        """
        known = {item.name: item for item in fields(cls)}
        unknown = [name for name in values if name not in known]
        if unknown:
            raise TypeError(f"unknown option {some_of(unknown)}; the options are {', '.join(known)}")
        chosen = dict(values)
        if isinstance(chosen.get("memory"), str):
            try:
                chosen["memory"] = parse_size(chosen["memory"])
            except ValueError as error:
                raise UsageError(str(error)) from None
        for name in ("allow_unused", "ignore_config_field"):
            value = chosen.get(name)
            if isinstance(value, str | list):
                chosen[name] = (value,) if isinstance(value, str) else tuple(value)
        return cls(**chosen)

    def shard_limit(self) -> int | None:
        """Bytes of tensors per output shard, or None to keep the base's files."""
        if self.max_shard_size == "keep":
            return None
        try:
            return parse_size(self.max_shard_size)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def worker_count(self) -> int:
        """The workers asked for, or one for each core this process may use."""
        return self.workers or machine.available_cores()

    def byte_options(self) -> dict[str, Any]:
        """Those options that change what is written."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.metadata["bytes"]}
