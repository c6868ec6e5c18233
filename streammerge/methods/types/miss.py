"""MiSS, and Bone as it was called before: one block of values, added again and again (Kang and Yin 2024,
arXiv:2409.15371).

With the block M (r, out) `W'[o, i] = W[o, i] + M[i mod r, o]`. `init_weights` says which variant it is: with `mini`
M (r, m) stands for outputs by `o mod m`, with `bat` M (out / r, r, r) also turns: r outputs share a matrix M_o, and
`W' = W + W M_o + M_o` in every block of r inputs (PEFT `tuners/miss/layer.py`, 0.17 to 0.21.2; `tuners/bone/layer.py`,
0.14 to 0.18).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise, whole
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.rotation import Rotation
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor


class Repeated(Blockwise):
    """Factors: `block` (K, V)."""

    title = "W[o, i] + M[i mod r, o mod m]"
    zero_if = ("block",)

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """The value for each output and input."""
        block_KV = whole(operation, "block", factors)
        height, width = block_KV.shape
        return block_KV.T[outs % width][:, ins % height]


class Turned(Rotation):
    """Factors: `blocks` (G, r * r); numbers: `rank`, which is r."""

    title = "W + W M_o + M_o"
    zero_if = ("blocks",)

    def turned(self, operation: Operation, weight_TI: Tensor, outs: Tensor, factors: Factors) -> Tensor:
        """The outputs that share a matrix, one such group after the other."""
        import torch

        rank = int(operation.numbers["rank"])
        blocks = whole(operation, "blocks", factors).reshape(-1, rank, rank)
        new = torch.empty_like(weight_TI)
        for group in range(int(outs[0]) // rank, int(outs[-1]) // rank + 1):
            at = (outs // rank == group).nonzero()[:, 0]
            rows = weight_TI[at].view(len(at), weight_TI.shape[1] // rank, rank)
            turned = rows + rows @ blocks[group] + blocks[group][outs[at] % rank][:, None, :]
            new[at] = turned.flatten(1)
        return new


class Miss(Method):
    """Factors: `miss_block` (r, out), (r, m) or (out / r, r, r)."""

    title = "MiSS"
    paper = "arXiv:2409.15371"
    only = "miss"
    slot: ClassVar[str] = "miss_block"
    known = Known(read=frozenset({"init_weights", "mini_r"}), no_consequence=frozenset({"r", "miss_dropout"}))
    modules = (slots("miss_block"),)
    formulas = MappingProxyType({"miss": Repeated(), "miss_bat": Turned()})
    layers = "Linear"
    local = "the same elements; whole rows with `bat`"

    def shape(self, module: ModuleFactors) -> Sizes:
        """Unknown: what the factors tell depends on the variant."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """One sum, or one turn."""
        shape = module.info(self.slot).shape
        variant = module.config.get("init_weights")
        if variant == "bat":
            yield self._bat(module, shape)
            return
        if len(shape) != 2:
            raise module.mismatch(f"`{self.slot}` has shape {list(shape)}, its `init_weights` is {variant!r}")
        if variant == "mini":
            transposed = module.transposed()
            wanted = fields.number(module.config, "mini_r", 1, whole=True)
            if shape[1] != wanted or module.sizes[1 if transposed else 0] % wanted:
                raise module.mismatch(f"`{self.slot}` has shape {list(shape)}, its `mini_r` is {wanted:,}")
        else:
            transposed = module.transposed(out=shape[1])
        if shape[0] > module.sizes[0 if transposed else 1]:
            raise module.mismatch(f"`{self.slot}` has shape {list(shape)}, of which the first is more than the inputs")
        yield module.change("miss", {"block": module.matrix(self.slot)}, {"scaling": 1.0}, transposed=transposed)

    def _bat(self, module: Module, shape: tuple[int, ...]) -> Effect:
        if len(shape) != 3 or shape[1] != shape[2]:
            raise module.mismatch(f"`{self.slot}` has shape {list(shape)}, its `init_weights` is 'bat'")
        groups, rank, _ = shape
        transposed = module.transposed(out=groups * rank)
        if module.sizes[0 if transposed else 1] % rank:
            raise module.mismatch(f"its blocks are of {rank:,} inputs")
        views = {"blocks": module.matrix(self.slot)}
        return module.change("miss_bat", views, {"rank": float(rank)}, transposed=transposed)


class Bone(Miss):
    """Factors: `bone_block` (r, out) or (out / r, r, r)."""

    title = "Bone"
    only = "bone"
    slot = "bone_block"
    known = Known(read=frozenset({"init_weights"}), no_consequence=frozenset({"r"}))
    modules = (slots("bone_block"),)
    eras = "PEFT 0.14 to 0.18; MiSS since"
