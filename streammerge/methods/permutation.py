"""The first numbers of a random permutation, without the rest of it.

FourierFT and WaveFT place their coefficients at the first n of `torch.randperm(in * out)`, which is hundreds of
megabytes of which a few kilobytes are used. torch makes it by Fisher and Yates from the front, so that n draws of its
Mersenne Twister settle the first n; only above 2^32 / 20 elements it goes another way, where every draw can still move
the first ones, and all of it has to be made (torch `aten/src/ATen/native/TensorFactories.cpp`, `randperm_cpu`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods.base import Factors

if TYPE_CHECKING:
    from torch import Tensor

WHOLE_FROM = (2**32 - 1) // 20
INT64 = 8
COPIES = 2


def permutation_memory(operation: Operation) -> int:
    """Bytes of the whole permutation, where that has to be made."""
    count = int(operation.numbers["outs"] * operation.numbers["ins"])
    return COPIES * INT64 * count if count >= WHOLE_FROM else 0


def first_permuted(operation: Operation, wanted: int, factors: Factors) -> Tensor:
    """`torch.randperm(outs * ins)[:wanted]` of a CPU generator with the operation's `seed`, int64 on the CPU."""
    import torch

    count, seed = int(operation.numbers["outs"] * operation.numbers["ins"]), int(operation.numbers["seed"])
    if count < WHOLE_FROM:
        return torch.tensor(first_of(count, seed, wanted))

    def draw() -> tuple[Tensor, ...]:
        return (torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed))[:wanted].clone(),)

    return factors.drawn(("permutation", count, seed, wanted), draw)[0]


@functools.lru_cache(maxsize=8)
def first_of(count: int, seed: int, wanted: int) -> tuple[int, ...]:
    """The first `wanted` numbers of a permutation of fewer than `WHOLE_FROM` elements. numpy's older generator is the
    same Mersenne Twister as torch's, seeded in the same way; torch too uses no more than 32 bits of a seed."""
    import numpy as np

    draws = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 2**32, size=min(wanted, count - 1), dtype=np.uint32)
    moved: dict[int, int] = {}
    found = []
    for position, draw in enumerate(draws.tolist()):
        other = position + draw % (count - position)
        found.append(moved.get(other, other))
        moved[other] = moved.get(position, position)
    if wanted == count:
        found.append(moved.get(count - 1, count - 1))
    return tuple(found)
