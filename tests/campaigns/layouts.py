"""Merges that the campaigns disturb: each one a command, its inputs, and what may lie in its output before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streammerge import api
from tests.refusals.making import (
    HIDDEN,
    SHAPES,
    TARGETS,
    all_factors,
    inputs_at,
    make_adapter,
    make_base,
    normal,
)
from tests.sinks.subjects import make_subject

LAYOUTS = (
    "sharded", "subject", "one file", "hashes", "overwrite", "foreign", "buffered", "sidecars", "dora", "weights",
    "untouched", "pread", "hub cache", "hard links",
)  # fmt: skip


class Layout:
    """A merge by its name in LAYOUTS, with everything below `root`. `before` are the options of a merge whose result
    lies in the output, `began` those of one that was killed there."""

    def __init__(self, name: str, root: Path) -> None:
        self.root, self.out, self.options = root, root / "out", {"workers": 2}
        self.before: dict[str, Any] | None = None
        self.began: dict[str, Any] | None = None
        self.base, self.adapters = inputs_of(name, root)
        match name:
            case "one file":
                self.options["max_shard_size"] = "1GB"
            case "hashes":
                self.options["sha256"] = True
            case "overwrite":
                self.before, self.options["overwrite"] = {"dtype": "float32"}, True
            case "foreign":
                # The same files of the same sizes: nothing but their bytes tells them from ours.
                self.began, self.options["overwrite"] = {"weights": [0.5]}, True
            case "buffered" | "pread":
                self.options["io" if name == "buffered" else "read"] = name
            case "weights":
                self.options["weights"] = [0.75, -2.0]

    def prepare(self) -> None:
        """The output as it is before the first run."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before is not None or self.began is not None:
            shutil.copytree(self.root / "before", self.out)

    def merge(self, out: Path, **options: Any) -> None:
        """The command."""
        api.merge(self.base, self.adapters, out, **{**self.options, **options})

    def command(self, out: Path) -> list[str]:
        """The command as words of the command line."""
        words = ["run", str(self.base), *map(str, self.adapters), "-o", str(out)]
        for name, value in self.options.items():
            flag = f"--{name.replace('_', '-')}"
            if name == "weights":
                words += [f"--weight={weight}" for weight in value]
            else:
                words += [flag] if value is True else [flag, str(value)]
        return words


def inputs_of(name: str, root: Path) -> tuple[Path, list[Path]]:
    """The base and the adapters of a layout."""
    if name == "subject":
        return make_subject(root, "BF16")
    if name == "dora":
        magnitudes = {
            f"base_model.model.{module}.lora_magnitude_vector": normal(f"{module} m", HIDDEN) for module in TARGETS
        }
        return make_base(root / "base"), [make_adapter(root / "adapter", all_factors() | magnitudes, use_dora=True)]
    if name == "weights":
        ups = [f"model.layers.{layer}.mlp.up_proj" for layer in range(2)]
        assert "mlp.up_proj" in SHAPES
        other = make_adapter(root / "other", all_factors(ups), target_modules=["up_proj"])
        return make_base(root / "base"), [make_adapter(root / "adapter"), other]
    if name == "untouched":
        return make_base(root / "base", shards=5), [make_adapter(root / "adapter", all_factors(TARGETS[:1]))]
    base, adapter = inputs_at(root)
    if name == "sidecars":
        for number in range(6):
            path = base / f"folder-{number % 3}" / ("deep" if number % 2 else ".") / f"notes-{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"notes {number}\n" * 500 * number)
    elif name == "hub cache":
        base = as_hub_cache(base, root / "hub")
    elif name == "hard links":
        (root / "linked").mkdir()
        for path in sorted(base.iterdir()):
            os.link(path, root / "linked" / path.name)
    return base, [adapter]


def as_hub_cache(base: Path, cache: Path) -> Path:
    """The files of a base as the Hub client lays them out: a snapshot of links to blobs."""
    repository = cache / "models--org--name"
    snapshot, blobs = repository / "snapshots" / ("c0" * 20), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        blob = blobs / f"{number:064x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    return snapshot


def roots_of(layout: Layout) -> Sequence[Path]:
    """The directories in which nothing may change."""
    beside = [layout.root / name for name in ("hub", "linked")]
    return [layout.base, *layout.adapters, *(path for path in beside if path.exists())]
