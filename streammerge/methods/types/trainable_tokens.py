"""Trainable tokens as a type of its own: rows of a table that take the place of the base's.

`W'[token_indices] = trainable_tokens_delta`, which are final rows and no deltas (PEFT
`tuners/trainable_tokens/layer.py`, 0.15 to 0.21.2). The files of tied models hold both sides, with the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from streammerge.methods.fields import Known
from streammerge.methods.method import Method
from streammerge.methods.module import Effect, Module


class TrainableTokens(Method):
    """Rows: `trainable_tokens_delta` (indices, width), read as those of a LoRA adapter are; there are no factors."""

    title = "Trainable tokens"
    paper = "none; huggingface/peft#2376"
    only = "trainable_tokens"
    tokens_in = "token_indices"
    known = Known(read=frozenset({"token_indices"}), no_consequence=frozenset({"init_weights"}))
    modules = ()
    formulas = MappingProxyType({})
    layers = "Embedding, and the output layer tied to it"
    local = "the same rows"

    def effects(self, module: Module) -> Iterator[Effect]:
        """None: rows are no factors."""
        yield from ()
