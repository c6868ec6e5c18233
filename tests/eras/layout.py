"""Where things lie in tests/data/eras: CASE/base-TRANSFORMERS and CASE/TRANSFORMERS-PEFT, as written by
scripts/make_era_fixtures.py. A base has weights of its own only if they are not those of the case's first release.
"""

from __future__ import annotations

import shutil
from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "eras"
WEIGHTS = "model.safetensors"
ADAPTERS = sorted(path.parent for path in DATA.glob("*/*/adapter"))
PAIRS = [(adapter, base) for adapter in ADAPTERS for base in sorted(adapter.parent.glob("base-*"))]
"""Every adapter with every base of its case."""


def identity(path: Path) -> str:
    """A test's name for a directory of a case."""
    return f"{path.parent.name}@{path.name}"


def own_base(adapter: Path) -> Path:
    """The base as saved by the transformers release that the adapter was trained with."""
    return adapter.parent / f"base-{adapter.name.partition('-')[0]}"


def weights_of(base: Path) -> Path:
    """The weights of a base: its own file, or that of the case's first release."""
    return base / WEIGHTS if (base / WEIGHTS).exists() else min(base.parent.glob(f"base-*/{WEIGHTS}"))


def assemble(base: Path, target: Path) -> Path:
    """A checkpoint directory of a base's config and weights."""
    target.mkdir()
    shutil.copyfile(base / "config.json", target / "config.json")
    shutil.copyfile(weights_of(base), target / WEIGHTS)
    return target
