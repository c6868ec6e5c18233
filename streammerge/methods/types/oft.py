"""OFT: a rotation of the inputs, block by block (Qiu et al. 2023, arXiv:2306.07280).

`W' = W R^T` with R = blockdiag(cayley(Q_1), ...). Four eras (PEFT `tuners/oft/layer.py` at v0.13.2, v0.15.2, v0.16.0,
v0.17.1 and v0.21.2), the first two told by their slots:

- to 0.13, `oft_r` alone: the rotation is one of the outputs, `W' = R^T W`, the last block cut off at the last output.
- 0.14 and 0.15, `oft_r` and `oft_s`: `W' = s (W R^T)`, Q the skew part of `oft_r`.
- since 0.16, `oft_R` holds the upper triangle of Q; unless `use_cayley_neumann` is false, R is the series
  `I + 2 Q + 2 Q^2 + ...` up to the power of `num_cayley_neumann_terms` - 1.
- since 0.18 the last term of that series counts once, and there are three terms beside I at least, if more than one.

Configs name their version since 0.18. With `coft` Q is shrunk to a radius first; `block_share` has one block for all.
On a kernel of more than one tap PEFT's merge, which this is, differs from PEFT's own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import FactorView, Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.cayley import cayley, neumann, skew_of_triangles, skew_part, within
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.outputs import OutputGroups
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.rotation import Rotation
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

HALF_SINCE = (0, 18, 0)
"""The PEFT version since which the last term of the series counts once."""
STACKS = 5
"""Stacks of blocks alive while rotations are made: Q, a power of it, the sum, and two temporaries."""


def rotations(operation: Operation, factors: Factors) -> Tensor:
    """The blocks of R (N, B, B), from factor `triangle` or `square`. Numbers: `size`, that is B; `radius` of `coft`,
    else 0; `powers` of the series, -1 for the exact transform, and what the `last` of them counts."""
    numbers, size = operation.numbers, int(operation.numbers["size"])
    name = "triangle" if "triangle" in operation.factors else "square"
    view = operation.factors[name]

    def make() -> Tensor:
        given = factors.part(view, (0, view.shape[0]), (0, view.shape[1]))
        blocks = skew_of_triangles(given, size) if name == "triangle" else given.reshape(-1, size, size)
        if numbers["radius"]:
            blocks = within(blocks, numbers["radius"])
        skew = blocks if name == "triangle" else skew_part(blocks)
        return cayley(skew) if numbers["powers"] < 0 else neumann(skew, int(numbers["powers"]), numbers["last"])

    return factors.made("rotations", [view], make)


def rotation_memory(operation: Operation) -> int:
    """Bytes of the blocks while they are made."""
    view = next(operation.factors[name] for name in ("triangle", "square") if name in operation.factors)
    return FLOAT64 * (view.count + STACKS * view.shape[0] * int(operation.numbers["size"]) ** 2)


class BlockRotation(Rotation):
    """Factors: `triangle` (N, B (B - 1) / 2) or `square` (N, B * B), N being 1 where one block is used for all, and
    `scale` (O) or none; numbers: those of `rotations`, and `forward`, 1 for `W R` instead of `W R^T`."""

    title = "W blockdiag(R)^T"

    def turned(self, operation: Operation, weight_TI: Tensor, outs: Tensor, factors: Factors) -> Tensor:
        """Every block of inputs by its own rotation, then every output by its scale."""
        blocks = rotations(operation, factors)
        size = blocks.shape[-1]
        wide = weight_TI.to(factors.dtype).reshape(len(weight_TI), -1, size).transpose(0, 1)
        turned = wide @ (blocks if operation.numbers["forward"] else blocks.mT)
        new = turned.transpose(0, 1).reshape(weight_TI.shape)
        if "scale" in operation.factors:
            new = new * factors.vector(operation.factors["scale"])[outs][:, None]
        return new

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The rotations as they are made, and three copies of the tile."""
        return super().memory(operation, tile) + rotation_memory(operation)


class OutputRotation(OutputGroups):
    """Factors: `square` (N, B * B), N being 1 where one block is used for all; numbers: those of `rotations`."""

    title = "blockdiag(R)^T W"

    def group(self, operation: Operation) -> int:
        """A block."""
        return int(operation.numbers["size"])

    def turned(self, operation: Operation, weight_TI: Tensor, outs: Tensor, factors: Factors) -> Tensor:
        """Every block of outputs by its own rotation; the outputs that the last one lacks are zero."""
        import torch

        size = self.group(operation)
        blocks = rotations(operation, factors)
        if len(blocks) > 1:
            blocks = blocks[outs[::size] // size]
        padded = torch.nn.functional.pad(weight_TI.to(factors.dtype), (0, 0, 0, -len(weight_TI) % size))
        turned: Tensor = blocks.mT @ padded.reshape(-1, size, padded.shape[1])
        return turned.reshape(padded.shape)[: len(weight_TI)]

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The rotations as they are made, and three copies of the tile."""
        return super().memory(operation, tile) + rotation_memory(operation)


class Oft(Method):
    """Factors: `oft_R` (N, B (B - 1) / 2), for embeddings `oft_embedding_R`; in older files `oft_r` (N, B, B) with
    `oft_s` (out, 1), or alone. N is the number of blocks, or 1."""

    title = "OFT"
    paper = "arXiv:2306.07280"
    only = "oft"
    known = Known(
        read=frozenset({"coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}),
        # How many blocks there are and how large they are, the file's shapes say.
        no_consequence=frozenset(
            {"r", "oft_block_size", "module_dropout", "init_weights", "rank_pattern", "alpha_pattern"}
        ),
    )
    modules = (slots("oft_R"), slots("oft_embedding_R"), slots("oft_r oft_s"), slots("oft_r"))
    formulas = MappingProxyType({"oft": BlockRotation(), "oft_outputs": OutputRotation()})
    layers = "Linear, Conv2d, Embedding"
    local = "whole rows; to PEFT 0.13 groups of rows"
    eras = (
        "`oft_r` is of 0.13 and older, with `oft_s` of 0.14 and 0.15; the last term of the series is halved since 0.18"
    )
    refuses = "the series in files of development versions between 0.17 and 0.18"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), the first where there is a scale for every output, the second where no block is shared."""
        if "oft_embedding_R" in module.slots or ("oft_r" in module.slots and "oft_s" not in module.slots):
            return None, None
        outputs = module.slots["oft_s"].count if "oft_s" in module.slots else None
        blocks, *rest = module.slots["oft_r" if "oft_s" in module.slots else "oft_R"].shape
        size = rest[0] if "oft_s" in module.slots else _size(rest[0])
        return outputs, (blocks * size if blocks > 1 else None)

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one rotation."""
        if module.has("oft_r"):
            yield self._scaled(module) if module.has("oft_s") else self._of_outputs(module)
            return
        slot = "oft_R" if module.has("oft_R") else "oft_embedding_R"
        triangle = module.matrix(slot)
        size = _size(triangle.shape[1])
        if size * (size - 1) // 2 != triangle.shape[1]:
            raise module.mismatch(f"`{slot}` has shape {list(triangle.shape)}, which are no triangles")
        numbers = {**_numbers(module, triangle, size, 1.0), **_series(module)}
        embedding = slot == "oft_embedding_R"
        transposed = not embedding and _transposed(module, triangle, size)
        if embedding:
            _check(module, triangle, size, module.sizes[1])
        numbers["forward"] = float(embedding)
        yield module.change("oft", {"triangle": triangle}, numbers, transposed=transposed)

    def _scaled(self, module: Module) -> Effect:
        """PEFT 0.14 and 0.15."""
        square, size = _squares(module)
        scale = module.vector("oft_s")
        transposed = _transposed(module, square, size, scale.shape[0])
        inputs = module.sizes[0 if transposed else 1]
        numbers = _numbers(module, square, size, float((-(-scale.shape[0] * size // inputs)) ** 2))
        numbers |= {"powers": -1.0, "last": 0.0, "forward": 0.0}
        return module.change("oft", {"square": square, "scale": scale}, numbers, transposed=transposed)

    def _of_outputs(self, module: Module) -> Effect:
        """PEFT 0.13 and older."""
        square, size = _squares(module)
        count, outs = square.shape[0], module.sizes[0]
        if count > 1 and size != -(-outs // count):
            raise module.mismatch(f"its {count:,} blocks of {size:,} outputs do not cover them")
        numbers = _numbers(module, square, size, float(size**2)) | {"powers": -1.0, "last": 0.0}
        return module.change("oft_outputs", {"square": square}, numbers)


def _size(triangle: int) -> int:
    """Rows of the matrix whose strict triangle has so many elements, if there is one."""
    return (1 + math.isqrt(1 + 8 * triangle)) // 2


def _squares(module: Module) -> tuple[FactorView, int]:
    """`oft_r` as (N, B * B), and B."""
    shape = module.info("oft_r").shape
    if len(shape) != 3 or shape[1] != shape[2]:
        raise module.mismatch(f"`oft_r` has shape {list(shape)}, which are no square blocks")
    return module.matrix("oft_r"), shape[1]


def _transposed(module: Module, blocks: FactorView, size: int, out: int | None = None) -> bool:
    """Whether the weight is stored (in, out), its inputs being whole blocks."""
    count = blocks.shape[0]
    transposed = module.transposed(out, count * size if count > 1 else None)
    _check(module, blocks, size, module.sizes[0 if transposed else 1])
    return transposed


def _check(module: Module, blocks: FactorView, size: int, inputs: int) -> None:
    """Refuse blocks that do not cover the inputs."""
    count = blocks.shape[0]
    shared = count == 1 and fields.flag(module.config, "block_share")
    if inputs % size or (count * size != inputs and not shared):
        raise module.mismatch(f"its {count:,} blocks are of {size:,} inputs")


def _numbers(module: Module, blocks: FactorView, size: int, times: float) -> dict[str, float]:
    """The size of a block, and the radius of `coft`: `eps` `times` what the era has it times, over the root of N."""
    eps = fields.number(module.config, "eps", 6e-5)
    constrained = fields.flag(module.config, "coft")
    return {"size": float(size), "radius": times * eps / math.sqrt(blocks.shape[0]) if constrained else 0.0}


def _series(module: Module) -> dict[str, float]:
    """How R is made of Q since 0.16."""
    if not fields.flag(module.config, "use_cayley_neumann", True):
        return {"powers": -1.0, "last": 0.0}
    terms = fields.number(module.config, "num_cayley_neumann_terms", 5, whole=True)
    if terms <= 2:
        return {"powers": float(terms - 1), "last": 2.0}
    written = str(module.config.get("peft_version"))
    version = fields.parse_version(written)
    if version and (0, 17, 1) < version <= HALF_SINCE and "dev" in written:
        reason = f"PEFT {written} may have written it before or after the last term of OFT's series was halved for 0.18"
        advice = "set `peft_version` in adapter_config.json to 0.17.1 or 0.18.0, whichever it is"
        raise NotMergeableError(("peft_version",), reason, advice)
    if version is None or version < HALF_SINCE:
        return {"powers": float(terms - 1), "last": 2.0}
    return {"powers": float(max(terms - 1, 3)), "last": 1.0}
