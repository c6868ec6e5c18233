"""The bases of a campaign by name: `llama-4GB`, `llama-1GB-fp32`, `moe`; built in a directory once, found there again.

A name is a kind of shapes.py, a size where it has another than the usual one, and `fp32` where it is not bfloat16. One
base serves adapters of several ranks. Nothing heavy is imported: see measure.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from measure import make_base
from shapes import KINDS

USUAL = {"moe": "2.5GB"}
"""Sizes of a kind that is named without one; 2GB otherwise."""
FP32 = "-fp32"
ALL = "llama-1GB,llama-4GB,llama-16GB,moe,one-tensor"
STREAMED = "llama-1GB,sparse-70b"
"""What is streamed and not written, in the order of its size."""


@dataclass(frozen=True)
class Base:
    """A base by its name; the directory of that name gets it and its adapters."""

    name: str
    kind: str
    size: str
    dtype: str = "BF16"

    def build(self, directory: Path, rank: int) -> tuple[Path, Path]:
        """The base and its adapter of one rank, which are made unless they are in `directory`."""
        options = ("--kind", self.kind, "--size", self.size, "--dtype", self.dtype, "--rank", str(rank))
        return make_base(directory / self.name, *options, adapter=f"adapter-r{rank}")


def base_of(name: str) -> Base:
    """The base of that name; SystemExit if there is no such kind."""
    rest = name.removesuffix(FP32)
    for kind in KINDS:
        if rest == kind or rest.startswith(f"{kind}-"):
            size = rest[len(kind) + 1 :] or USUAL.get(kind, "2GB")
            return Base(name, kind, size, "BF16" if rest == name else "F32")
    raise SystemExit(f"no such base: {name}; a name is one of {', '.join(KINDS)}, or one with a size: llama-4GB")


def bases_of(names: str) -> list[Base]:
    """The bases of a list with commas."""
    return [base_of(name) for name in names.split(",")]


def ranks_of(text: str) -> list[int]:
    """The ranks of a list with commas."""
    return [int(rank) for rank in text.split(",")]


def size_of(root: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(path.stat().st_size for path in root.iterdir() if path.is_file())
