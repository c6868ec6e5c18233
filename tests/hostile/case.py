"""What a malicious input is: a name, what is done to healthy inputs, and what the command has to say of it.

A `Place` is a folder with a healthy base, a healthy adapter, and an `outside` that nothing may reach. Each kind of
input has a module beside this one with a table of cases; `corpus.py` puts them together. The invariant: a case changes
nothing but what lies below its place, and makes the same bytes every time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.refusals.making import (
    BASE_CONFIG,
    INDEX,
    Stored,
    all_factors,
    base_tensors,
    load,
    make_adapter,
    make_base,
    save,
    shard_name,
    write_json,
)

SHARD = shard_name(0, 2)
CANARY = "canary"
TOKEN = "hf_CanaryCanaryCanaryCanaryCanaryCa"
"""In no way a real one."""


@dataclass(slots=True)
class Place:
    """A folder of inputs, and what the command is given beside them."""

    root: Path
    options: list[str] = field(default_factory=list)
    base_argument: str = ""
    adapter_argument: str = ""

    @property
    def base(self) -> Path:
        """The base."""
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        """The adapter."""
        return self.root / "adapter"

    @property
    def outside(self) -> Path:
        """What no input may lead to: weights and a secret."""
        return self.root / "outside"

    @property
    def out(self) -> Path:
        """Where the output would be."""
        return self.root / "out"

    def arguments(self) -> list[str]:
        """Of `streammerge run`."""
        base, adapter = self.base_argument or str(self.base), self.adapter_argument or str(self.adapter)
        return ["run", base, adapter, "-o", str(self.out), *self.options]

    # --- what cases do ----------------------------------------------------------------------------------------------
    def config(self, **changes: Any) -> None:
        """Other values in the base's config."""
        self._edit(self.base / BASE_CONFIG, changes)

    def lora(self, **changes: Any) -> None:
        """Other values in the adapter's config."""
        self._edit(self.adapter / "adapter_config.json", changes)

    def index(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Another index."""
        document = json.loads((self.base / INDEX).read_text())
        change(document["weight_map"])
        write_json(self.base / INDEX, document)

    def tensors(self, change: Callable[[dict[str, Stored]], object]) -> None:
        """Other tensors in the base's first shard, which the index knows of."""
        tensors = load(self.base / SHARD)
        before = set(tensors)
        change(tensors)
        save(self.base / SHARD, tensors)
        self.index(lambda found: found.update({name: SHARD for name in tensors if name not in before}))

    def factors(self, change: Callable[[dict[str, Stored]], object]) -> None:
        """Other tensors in the adapter."""
        tensors = all_factors()
        change(tensors)
        save(self.adapter / "adapter_model.safetensors", tensors)

    def write(self, name: str, data: bytes | str) -> Path:
        """A file below the place, instead of the one that is there."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def link(self, name: str, target: str | Path) -> None:
        """A symbolic link instead of the file that is there."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def special(self, name: str, make: Callable[[str], object]) -> None:
        """A file that is not regular instead of the one that is there."""
        path = self.root / name
        path.unlink(missing_ok=True)
        make(str(path))

    def _edit(self, path: Path, changes: Mapping[str, Any]) -> None:
        write_json(path, {**json.loads(path.read_text()), **changes})


@dataclass(frozen=True, slots=True)
class Case:
    """One malicious input: `spoil` makes it of healthy ones; `code`, `error` and `words` are what the command ends with
    and what has to be in its message. `code` 0 is for what looks malicious and is right to take; then `look` says what
    is wrong with the output, or nothing."""

    name: str
    spoil: Callable[[Place], object]
    code: int
    error: str
    words: tuple[str, ...]
    look: Callable[[Place], str] = field(default=lambda place: "")


def malformed(name: str, spoil: Callable[[Place], object], *words: str) -> Case:
    """A file that breaks the rules of its format."""
    return Case(name, spoil, 3, "MalformedInputError", words)


def unsafe(name: str, spoil: Callable[[Place], object], *words: str) -> Case:
    """An input that would lead outside, or run code."""
    return Case(name, spoil, 3, "UnsafeInputError", words)


def missing(name: str, spoil: Callable[[Place], object], *words: str) -> Case:
    """Something that is named and not there."""
    return Case(name, spoil, 3, "InputMissingError", words)


def unfit(error: str) -> Callable[..., Case]:
    """A maker of cases in which the adapter is refused with one class of error."""
    return lambda name, spoil, *words: Case(name, spoil, 4, error, words)


def fine(
    name: str, spoil: Callable[[Place], object], *words: str, look: Callable[[Place], str] = lambda place: ""
) -> Case:
    """What only looks malicious; `words` are in what is said on the way."""
    return Case(name, spoil, 0, "", words, look)


def healthy_place(root: Path) -> Place:
    """A base of two shards with a sidecar of code, an adapter, and the outside."""
    make_base(root / "base", base_tensors())
    make_adapter(root / "adapter")
    outside = root / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text(f"the secret {TOKEN}\n")
    (outside / "secret.json").write_text(json.dumps({"secret": TOKEN}))
    (outside / "code.py").write_text("the_secret = 1\n")
    save(outside / "model.safetensors", load(root / "base" / SHARD))
    save(outside / "adapter_model.safetensors", all_factors())
    write_json(outside / "adapter_config.json", json.loads((root / "adapter" / "adapter_config.json").read_text()))
    (root / "temporary").mkdir()
    return Place(root)


def fifo(path: str) -> None:
    """A pipe that nobody writes to."""
    os.mkfifo(path)
