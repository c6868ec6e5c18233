"""Whether an output is the merge that streammerge wrote: the same tensors, and the values of some that were changed.

    python bench/outputs.py BASE REFERENCE OUTPUT

so that nobody is timed for work that was left undone. Mergers add in other precisions and round once or twice, so that
a value may be off by one place of bfloat16; where weight and delta cancel, by one of theirs. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open

PLACE = 2.0**-7
"""The largest distance of a bfloat16 to the next, as a part of its value."""
SAMPLES, ROWS = 24, 64


class Weights:
    """The tensors of a checkpoint in shards, opened where they lie."""

    def __init__(self, root: Path) -> None:
        files = [safe_open(path, framework="pt") for path in sorted(root.glob("*.safetensors"))]
        self.found = {name: file.get_slice(name) for file in files for name in file.keys()}  # noqa: SIM118 - no mapping

    def rows(self, name: str) -> torch.Tensor:
        """The first and the last rows of a tensor."""
        tensor = self.found[name]
        count = tensor.get_shape()[0]
        return torch.cat([tensor[: min(ROWS, count)], tensor[max(0, count - ROWS) :]])


def changed(base: Weights, reference: Weights) -> list[str]:
    """Up to SAMPLES names of tensors, from first to last, whose values a merge changed."""
    names = [name for name, tensor in base.found.items() if tensor.get_shape()[1:]]
    step = max(1, len(names) // (4 * SAMPLES))
    found = [name for name in [*names[::step], names[-1]] if not torch.equal(base.rows(name), reference.rows(name))]
    return found[:: max(1, len(found) // SAMPLES)]


def compared(base: Weights, reference: Weights, output: Weights) -> dict[str, float]:
    """The figures of a comparison; SystemExit where the outputs differ by more than rounding."""
    if differing := sorted(reference.found.keys() ^ output.found.keys()):
        raise SystemExit(f"{len(differing)} tensors are in one output only: {', '.join(differing[:5])}")
    names = changed(base, reference)
    if not names:
        raise SystemExit("the reference is the base")
    equal, count, worst = 0, 0, 0.0
    for name in names:
        old, wanted, got = base.rows(name), reference.rows(name), output.rows(name)
        if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
            raise SystemExit(f"{name}: {got.dtype} {tuple(got.shape)}, not {wanted.dtype} {tuple(wanted.shape)}")
        equal, count = equal + int((got == wanted).sum()), count + got.numel()
        allowed = PLACE * (wanted.double().abs() + old.double().abs())
        worst = max(worst, float(((got.double() - wanted.double()).abs() / allowed.clamp(min=1e-30)).max()))
        if worst > 1:
            raise SystemExit(f"{name}: values are {worst:.1f} times as far from the reference as rounding explains")
    return {"tensors": len(output.found), "compared": len(names), "equal": equal / count, "worst": worst}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("base", "reference", "output"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    base, reference, output = (Weights(root) for root in (arguments.base, arguments.reference, arguments.output))
    print(json.dumps(compared(base, reference, output)))


if __name__ == "__main__":
    main()
