"""Builds the tiny models named on the command line, or all, and prints one line for each."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter

import torch
import transformers

from .building import NOT_BUILDABLE, build, cases


def main(model_types: list[str]) -> int:
    """The exit status: 1 where what is built is not what `NOT_BUILDABLE` says."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for mapping, model_type in cases():
        if model_types and model_type not in model_types:
            continue
        started = time.perf_counter()
        outcome, text = _outcome(mapping, model_type)
        counts[outcome] += 1
        seconds = time.perf_counter() - started
        print(f"{outcome:<14} {mapping:<16} {model_type:<26} {seconds:6.2f} s  {text}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["FAILED"] else 0


def _outcome(mapping: str, model_type: str) -> tuple[str, str]:
    """What became of a pair, and its number of parameters or the reason."""
    reason = NOT_BUILDABLE.get((mapping, model_type))
    try:
        model = build(model_type, mapping)
    except Exception as error:  # a table of all of them, whatever happens to one
        return ("not buildable", reason) if reason else ("FAILED", f"{type(error).__name__}: {error}")
    size = f"{sum(parameter.numel() for parameter in model.parameters()):9,} parameters"
    return ("FAILED", f"builds, though {reason}") if reason else ("ok", size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
