"""What is not in the file, but was drawn at random from a seed: what that depends on beside the module at hand.

PEFT draws projections once for all modules, in the sizes of the widest, and rounds them to the dtype of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.core.dtypes import torch_dtype
from streammerge.core.errors import NotMergeableError
from streammerge.methods import fields
from streammerge.methods.module import Module

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SEED = 2**53
"""Above it a number of an operation would not be exact."""


def seed_of(module: Module, field: str, default: int) -> float:
    """A seed of the config. Raises ConfigContradictionError for what is none, NotMergeableError for one that is too
    large."""
    value = module.config.get(field)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise fields.wrong(field, value, "a whole number")
    if abs(value) > LARGEST_SEED:
        raise NotMergeableError((f"{field} = {value}",), f"`{field}` is a seed beyond {LARGEST_SEED:,}")
    return float(value)


def every(module: Module, slot: str) -> list[Module]:
    """All modules of the adapter that have a slot. Raises NotMergeableError where one of them is not in the base, so
    that what depends on all of them is not known."""
    wanted = sum(slot in factors.slots for factors in module.adapter.parts.modules)
    found = [replace(module, factors=f, target=t) for f, t in module.siblings if slot in f.slots]
    if len(found) < wanted:
        raise module.refused(
            f"its projections were not saved, and depend on all adapted modules; {wanted - len(found):,} of "
            f"{wanted:,} are not in the base"
        )
    return found


def largest(module: Module, slot: str, sizes: Callable[[Module, int], tuple[int, int]]) -> tuple[int, int]:
    """The most outputs and the most inputs of all modules, from the length of a slot of theirs."""
    both = [sizes(one, one.info(slot).count) for one in every(module, slot)]
    return max(out for out, _ in both), max(into for _, into in both)


def the_one_dtype(module: Module) -> str:
    """The dtype of all adapted parameters. Raises NotMergeableError where there are several: which of them the
    projections were rounded to depends on an order that no file tells."""
    dtypes = sorted({target.dtype for _, target in module.siblings})
    if len(dtypes) > 1:
        reason = f"its projections were not saved, and are rounded to the base's dtype, of which there are {dtypes}"
        raise module.refused(reason)
    return dtypes[0]


def rounded(values: Tensor, dtype: str) -> Tensor:
    """float32 values rounded to a dtype, as float32."""
    import torch

    return values.to(torch_dtype(dtype)).to(torch.float32)


def linear_sizes(module: Module) -> tuple[int, int, bool]:
    """Outputs and inputs of a linear layer, and whether its weight is stored (in, out), where its factors do not tell:
    then the architecture does, else `fan_in_fan_out`."""
    shape = module.target.shape
    if len(shape) != 2:
        raise module.mismatch("its factors are for a linear layer")
    transposed = module.transposed()
    return (shape[1], shape[0], True) if transposed else (shape[0], shape[1], False)
