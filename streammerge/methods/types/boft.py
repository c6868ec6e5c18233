"""BOFT: rotations of blocks of inputs, butterfly after butterfly, then a scale (Liu et al. 2023, arXiv:2311.06243).

`W' = s (W M^T)` with `M = ... (P_2 R_2 P_2^T) (P_1 R_1 P_1^T)`, each R a diagonal of blocks out of Cayley's transform
of skew parts, and each P a permutation (PEFT `tuners/boft/layer.py`, 0.13 to 0.21.2). With one butterfly factor, all
that PEFT has where its CUDA extension cannot be built, P is the identity. A kernel is taken as one row; before 0.14
PEFT took its values in another order, in training too, which is not merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from streammerge.methods import fields
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.types.oft import BlockRotation

KERNELS_SINCE = (0, 14, 0)
"""The PEFT version since which a kernel is a row of the matrix that is turned."""


class Boft(Method):
    """Factors: `boft_R` (F, N, B, B) for F butterfly factors and N blocks, `boft_s` (out, 1), for kernels (1, out)."""

    title = "BOFT"
    paper = "arXiv:2311.06243"
    only = "boft"
    known = Known(
        # How many blocks and factors there are, the file's shapes say.
        no_consequence=frozenset(
            {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "init_weights"}
        ),
    )
    modules = (slots("boft_R boft_s"),)
    formulas = MappingProxyType({"boft": BlockRotation()})
    layers = "Linear, Conv2d"
    local = "whole rows"
    eras = "kernels of PEFT before 0.14 are other ones"
    refuses = "more than one butterfly factor; kernels of PEFT before 0.14"

    def shape(self, module: ModuleFactors) -> tuple[int, int] | None:
        """(out, in)."""
        shape = module.slots["boft_R"].shape
        return (module.slots["boft_s"].count, shape[1] * shape[2]) if len(shape) == 4 else None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one rotation."""
        shape = module.info("boft_R").shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise module.mismatch(f"`boft_R` has shape {list(shape)}, which are no square blocks")
        factors, count, size, _ = shape
        if factors > 1:
            reason = f"it has {factors} butterfly factors, which PEFT's CUDA extension computes; one is merged"
            raise module.refused(reason)
        if len(module.target.shape) > 2:
            _check_era(module)
        scale = module.vector("boft_s")
        transposed = module.transposed(scale.count, count * size)
        views = {"square": module.matrix("boft_R", count), "scale": scale}
        numbers = {"size": float(size), "radius": 0.0, "powers": -1.0, "last": 0.0, "forward": 0.0}
        yield module.change("boft", views, numbers, transposed=transposed)


def _check_era(module: Module) -> None:
    """Refuse a kernel whose values were taken in another order."""
    matters = "PEFT takes the values of a kernel in another order since 0.14"
    if fields.version_of(module.config, module.name, matters) < KERNELS_SINCE:
        raise module.refused("PEFT before 0.14 takes the values of a kernel in another order, which is not merged")
