"""What one case of the oracle is: a base, an adapter as PEFT makes it, and what the merged result must equal.

A case is an entry in a table; everything it does not say has the usual value: the adapter is trained on the base as it
is, saved by PEFT, and compared with PEFT's own merge of the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

Tensors = dict[str, torch.Tensor]
Loader = Callable[[Path, torch.dtype], nn.Module]


class Oracle(Enum):
    """Where the expected tensors come from."""

    MERGE = "PEFT's merge of the same files"
    UNTIED = "PEFT's merge of the same files into the base with its tie dissolved"
    FORMULA = "the formula in float64, where PEFT's merge fails or is wrong; the case brings it"


@dataclass(frozen=True, slots=True)
class Case:
    """One adapter on one base. `arguments` are those of the class `peft` of PEFT.

    `trained_on` loads the model the adapter is trained on from the base; None: as what it was saved. `loads_as` loads
    the output; None: like `trained_on`. `prepare` is done to the model before the adapter is added, in training as in
    the reference. `train` is done to the adapted model before it is saved; `save` are arguments of PEFT's
    `save_pretrained`, or makes them. `edit` is done to a copy of the saved files, which streammerge then gets; PEFT
    reads the copy only if `peft_reads_edit`. `rename` turns the reference's tensor names into those of the output, or
    into None for one that the output need not have; `formula` makes the expected tensors from the base (float64) and
    the adapter's directory.
    """

    name: str
    base: str
    arguments: Mapping[str, Any]
    oracle: Oracle = Oracle.MERGE
    trained_on: Loader | None = None
    loads_as: Loader | None = None
    prepare: Callable[[nn.Module], None] | None = None
    train: Callable[[PeftModel], None] | None = None
    save: Mapping[str, Any] | Callable[[PeftModel, Path], Mapping[str, Any]] = field(default_factory=dict)
    edit: Callable[[Path], None] | None = None
    peft_reads_edit: bool = False
    rename: Callable[[str], str | None] | None = None
    formula: Callable[[Tensors, Path], Tensors] | None = None
    rounds_twice: tuple[str, ...] = ()
    """Endings of tensor names that PEFT rounds twice in bfloat16; there only the correct rounding is asked for."""
    draws_by_dtype: bool = False
    """Whether PEFT rounds what it draws to the dtype of the base: a reference in another one is loaded in that, and
    widened before it is merged."""
    rounds_base: bool = False
    """Whether the method rounds in the middle, so that there is no one correct rounding of the whole."""
    forward: bool = True
    """Whether the adapter's forward pass is defined in PEFT and compared with the output's."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of the base the case is about."""
    beside_base: bool = False
    """Whether the output may hold tensors that the reference does not have: those of the base, unchanged."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the output's config.json and their values."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options the merge is told."""
    peft: str = "LoraConfig"
    """The class of the adapter's config."""
    exact: bool = True
    """Whether PEFT's merge in float64 is the exact result, to which ours must be the nearest."""
    error: float = 2e-6
    """Of the largest weight, in float32."""

    def __str__(self) -> str:
        return self.name
