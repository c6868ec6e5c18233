"""FourierFT: `W + scaling * Re(ifft2(S))`, S zero but for n coefficients (Gao et al. 2024, arXiv:2405.03003).

S is (out, in); its coefficients are at the first n of a random permutation of all its elements, numbered row by row,
by `random_loc_seed` (PEFT `tuners/fourierft/layer.py`, 0.13 to 0.21.2). With coefficient c_k at row y_k and column x_k

    delta[o, i] = Re(sum_k c_k exp(2 pi j y_k o / out) exp(2 pi j x_k i / in)) / (out in)

so that a few rows take a sum for each row and column of S that has a coefficient, and then one transform a row: never
that of the whole matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise
from streammerge.methods.drawn import linear_sizes, seed_of
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.permutation import first_permuted, permutation_memory
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

COPIES = 6
"""float64 matrices of a tile's height alive at once: a complex one is two, before and after its transform."""


class Spectrum(Blockwise):
    """Factors: `spectrum` (n); numbers: `outs` and `ins` of the module, `seed`."""

    title = "W + scaling * Re(ifft2(S))"
    zero_if = ("spectrum",)

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Transforms of whole lines, the coefficients' phases on each of them, and their positions."""
        lines, count = min(tile), operation.factors["spectrum"].count
        longest = int(max(operation.numbers["outs"], operation.numbers["ins"]))
        return FLOAT64 * (COPIES * lines * (longest + count) + 8 * count)

    def state_memory(self, operation: Operation) -> int:
        """The permutation, where it is made whole."""
        return permutation_memory(operation)

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """Transforms along whichever side is longer. On the CPU: sums into few places in a fixed order."""
        size_out, size_in = int(operation.numbers["outs"]), int(operation.numbers["ins"])
        spectrum = factors.vector(operation.factors["spectrum"]).cpu()
        at = first_permuted(operation, len(spectrum), factors)
        rows, cols = at // size_in, at % size_in
        if len(outs) <= len(ins):
            made = _lines(spectrum, (rows, cols), outs.cpu(), (size_out, size_in))[:, ins.cpu()]
        else:
            made = _lines(spectrum, (cols, rows), ins.cpu(), (size_in, size_out))[:, outs.cpu()].T
        return made.to(outs.device, factors.dtype)


def _lines(spectrum: Tensor, at: tuple[Tensor, Tensor], lines: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows `lines` (L) of the real part of the inverse transform of a matrix of `size`, float64 (L, columns)."""
    import torch

    turns = (lines[:, None] * at[0][None]) % size[0]  # of whole ones, which need not be turned at all
    angles = turns.double() * (2 * math.pi / size[0])
    wide = spectrum.double()
    partial = torch.zeros((len(lines), size[1]), dtype=torch.complex128)
    partial.index_add_(1, at[1], torch.complex(wide * angles.cos(), wide * angles.sin()))
    made: Tensor = torch.fft.ifft(partial, dim=1).real / size[0]
    return made


class FourierFt(Method):
    """Factors: `fourierft_spectrum` (n)."""

    title = "FourierFT"
    paper = "arXiv:2405.03003"
    only = "fourier"
    known = Known(
        read=frozenset({"scaling", "random_loc_seed"}),
        # How many coefficients there are, the file says.
        no_consequence=frozenset({"n_frequency", "n_frequency_pattern", "init_weights"}),
    )
    modules = (slots("fourierft_spectrum"),)
    formulas = MappingProxyType({"fourierft": Spectrum()})
    layers = "Linear, Conv1D"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> Sizes:
        """A matrix's: the coefficients tell no sizes."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one transform."""
        spectrum = module.vector("fourierft_spectrum")
        out, into, transposed = linear_sizes(module)
        if spectrum.count > out * into:
            raise module.mismatch(f"`fourierft_spectrum` has {spectrum.count:,} coefficients")
        numbers = {
            "scaling": float(fields.number(module.config, "scaling", 150.0)),
            "seed": seed_of(module, "random_loc_seed", 777),
            "outs": float(out),
            "ins": float(into),
        }
        yield module.change("fourierft", {"spectrum": spectrum}, numbers, transposed=transposed)
