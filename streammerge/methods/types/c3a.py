"""C3A: blocks that are circulant matrices (Chen et al. 2024, arXiv:2407.19342).

In the block of outputs p and inputs q `W'[i, j] = W[i, j] + k[p, q, (j - i) mod b] / in` (PEFT `tuners/c3a/layer.py`
and `utils.py`, 0.16 to 0.21.2, by a Fourier transform). In half precision PEFT rounds twice before it adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise, whole
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors

if TYPE_CHECKING:
    from torch import Tensor


class Circulant(Blockwise):
    """Factors: `kernel` (P, Q * B) for P blocks of outputs and Q of inputs; numbers: `size`, which is B."""

    title = "W + scaling * circulant blocks"
    zero_if = ("kernel",)

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """Where a diagonal of a block goes through the tile, the kernel's one value for it."""
        size = int(operation.numbers["size"])
        diagonal = (ins[None, :] - outs[:, None]) % size
        return whole(operation, "kernel", factors)[(outs // size)[:, None], (ins // size * size)[None, :] + diagonal]


class C3a(Method):
    """Factors: `c3a_kernel` (out / b, in / b, b)."""

    title = "C3A"
    paper = "arXiv:2407.19342"
    only = "c3a"
    known = Known(no_consequence=frozenset({"block_size", "block_size_pattern", "init_weights"}))
    modules = (slots("c3a_kernel"),)
    formulas = MappingProxyType({"c3a": Circulant()})
    layers = "Linear"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> tuple[int, int] | None:
        """(out, in)."""
        shape = module.slots["c3a_kernel"].shape
        return (shape[0] * shape[2], shape[1] * shape[2]) if len(shape) == 3 else None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one sum."""
        shape, sizes = module.info("c3a_kernel").shape, self.shape(module.factors)
        if sizes is None:
            raise module.mismatch(f"`c3a_kernel` has shape {list(shape)}, which are no blocks of kernels")
        numbers = {"scaling": 1 / sizes[1], "size": float(shape[2])}
        views = {"kernel": module.matrix("c3a_kernel")}
        yield module.change("c3a", views, numbers, transposed=module.transposed(*sizes))
