"""Third parties' warnings in the cases of all architectures, and their settings for tiny models."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models lose by threads

import warnings
from collections.abc import Iterator

import pytest
import torch
import transformers


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Hundreds of modeling files are imported and set up: what they warn of is theirs. Ours are still errors."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        for module in ("transformers", "peft", "torch", "importlib"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")
        yield
