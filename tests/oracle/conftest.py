"""Fixtures of the oracle: the session's workbench, and third parties' warnings."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny models lose by threads

import warnings
from collections.abc import Iterator

import pytest
import torch
import transformers

from tests.oracle.workbench import Workbench

THIRD_PARTY = [
    # transformers 5 asks a renamed attribute of its own while PEFT sets up a model.
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    # PEFT says what it decides about embeddings and directions; the cases are about just that.
    ("Setting `save_embedding_layers` to `True`", UserWarning),
    ("fan_in_fan_out is set to (True|False) but", UserWarning),
    # It warns of ties, because its merge is wrong there: what the cases of ties are about.
    ("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", UserWarning),
    # The same adapter is loaded into the base with its tie dissolved, where there is nothing left to ensure.
    ("You have requested `ensure_weight_tying`, but no tied modules", UserWarning),
    # The conversion loads the initial adapter beside the trained one.
    ("(PiSSA|OLoRA) changes the base weights of the model and should thus not be used with other", UserWarning),
    # PEFT looks for the pattern among the modules, where a parameter is not; it obeys the pattern nevertheless.
    (r"The following (rank|alpha)_pattern keys did not match any targeted module .*experts\.", RuntimeWarning),
    # PEFT 0.21 takes the bias of `lora_bias` for a factor of a wrong shape.
    (r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape: [^,]*\.lora_B\.bias:", UserWarning),
    # The forward test compares with the base without its adapter, whose biases then are still the trained ones.
    ("Careful, disabling adapter layers with bias configured", UserWarning),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings that PEFT and transformers give in the cases, each known; any other is still an error."""
    with warnings.catch_warnings():
        for message, category in THIRD_PARTY:
            warnings.filterwarnings("ignore", message, category)
        yield


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """Where files of all cases are made, each once."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return Workbench(tmp_path_factory.mktemp("oracle"))
