"""WaveFT: `W + scaling * idwt2(S)`, S zero but for n coefficients (Bilican et al. 2025, arXiv:2505.12532); with
`use_idwt` false `W + scaling * S` (PEFT `tuners/waveft/layer.py` and `waverec2d.py`, as of 0.21.2).

The coefficients are at the first n of a random permutation of the elements of an (out, in) matrix, numbered row by
row, by `random_loc_seed`. For the transform that matrix stands in the middle of one wider by the filter's length less
two, and even, whose quarters are the bands of one level: low, and right of it what is high along the rows' own axis,
below it what is high along the columns' own. A coefficient at (p, q) of its band adds the product of two filters to
the rows from 2 p and the columns from 2 q on; the middle of the sum is the delta.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.core.text import printable
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
from streammerge.methods.wavelets import LOW_PASS, high_pass
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = tuple(LOW_PASS)
UNFILTERED = -1
AT_ONCE = 2**18
"""Elements that coefficients are spread over at a time."""
COPIES = 6
"""Of such elements alive at once: values, positions, masks."""


class Wavelets(Blockwise):
    """Factors: `spectrum` (n); numbers: `outs` and `ins` of the module, `seed`, and `family`, a number of FAMILIES, or
    `UNFILTERED`."""

    title = "W + scaling * idwt2(S)"
    zero_if = ("spectrum",)

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """A block and its copy, the coefficients' positions, and what is spread at a time."""
        sizes = operation.numbers["outs"] + operation.numbers["ins"]
        count = operation.factors["spectrum"].count
        return FLOAT64 * int(2 * tile[0] * tile[1] + sizes + 16 * count + COPIES * AT_ONCE)

    def state_memory(self, operation: Operation) -> int:
        """The permutation, where it is made whole."""
        return permutation_memory(operation)

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """The sum of what reaches the block. On the CPU: many values into few places in a fixed order."""
        import torch

        spectrum = factors.vector(operation.factors["spectrum"]).double().cpu()
        sizes = int(operation.numbers["outs"]), int(operation.numbers["ins"])
        spread = _spread(first_permuted(operation, len(spectrum), factors), sizes, int(operation.numbers["family"]))
        rows = _reached(spread.rows, spread.row_filters.shape[1], outs.cpu(), sizes[0])
        cols = _reached(spread.cols, spread.col_filters.shape[1], ins.cpu(), sizes[1])
        made = torch.zeros(len(outs) * len(ins), dtype=torch.float64)
        touching = ((rows >= 0).any(1) & (cols >= 0).any(1)).nonzero()[:, 0]
        for few in torch.split(touching, max(1, AT_ONCE // (rows.shape[1] * cols.shape[1]))):
            values = spectrum[few, None, None] * spread.row_filters[few][:, :, None] * spread.col_filters[few][:, None]
            inside = (rows[few] >= 0)[:, :, None] & (cols[few] >= 0)[:, None]
            where = rows[few][:, :, None] * len(ins) + cols[few][:, None]
            made.index_add_(0, where[inside], values[inside])
        return made.view(len(outs), len(ins)).to(outs.device, factors.dtype)


@dataclass(frozen=True, slots=True)
class Spread:
    """Where coefficients add what: the first row and column of each (n), which may lie outside of the delta, and the
    filters along both (n, taps)."""

    rows: Tensor
    cols: Tensor
    row_filters: Tensor
    col_filters: Tensor


def _spread(at: Tensor, sizes: tuple[int, int], family: int) -> Spread:
    """The coefficients at elements `at` (n) of a matrix of `sizes`."""
    import torch

    rows, cols = at // sizes[1], at % sizes[1]
    if family == UNFILTERED:
        ones = torch.ones((len(at), 1), dtype=torch.float64)
        return Spread(rows, cols, ones, ones)
    low = LOW_PASS[FAMILIES[family]]
    filters = torch.tensor([low, high_pass(low)], dtype=torch.float64)
    first_row, below = _in_band(rows, sizes[0], len(low))
    first_col, right = _in_band(cols, sizes[1], len(low))
    return Spread(first_row, first_col, filters[right.long()], filters[below.long()])


def _in_band(lines: Tensor, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """The first line of the delta that coefficients on `lines` add to, and whether they are in the second half."""
    padded = size + taps - 2
    padded += padded % 2
    half = padded // 2
    within = lines + (padded - size) // 2
    cropped = taps - 2 + (padded - taps + 2 - size) // 2
    return 2 * (within % half) - cropped, within >= half


def _reached(first: Tensor, taps: int, lines: Tensor, size: int) -> Tensor:
    """For each tap of each coefficient (n, taps) the position of its line among `lines`, -1 where it is not there."""
    import torch

    position = torch.full((size + 1,), -1, dtype=torch.int64)
    position[lines] = torch.arange(len(lines))
    reached = first[:, None] + torch.arange(taps)[None]
    reached[(reached < 0) | (reached >= size)] = size
    return position[reached]


class WaveFt(Method):
    """Factors: `waveft_spectrum` (n)."""

    title = "WaveFT"
    paper = "arXiv:2505.12532"
    only = "waveft"
    known = Known(
        read=frozenset({"scaling", "random_loc_seed", "wavelet_family", "use_idwt"}),
        # How many coefficients there are, the file says.
        no_consequence=frozenset({"n_frequency", "n_frequency_pattern", "proportional_parameters", "init_weights"}),
    )
    modules = (slots("waveft_spectrum"),)
    formulas = MappingProxyType({"waveft": Wavelets()})
    layers = "Linear, Conv1D"
    local = "the same elements"
    refuses = "wavelets beyond db10, sym10 and coif3: PEFT has no filters of theirs, or numbers that are none"

    def shape(self, module: ModuleFactors) -> Sizes:
        """A matrix's: the coefficients tell no sizes."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one transform."""
        spectrum = module.vector("waveft_spectrum")
        out, into, transposed = linear_sizes(module)
        if spectrum.count > out * into:
            raise module.mismatch(f"`waveft_spectrum` has {spectrum.count:,} coefficients")
        numbers = {
            "scaling": float(fields.number(module.config, "scaling", 25.0)),
            "seed": seed_of(module, "random_loc_seed", 777),
            "outs": float(out),
            "ins": float(into),
            "family": float(_family(module)),
        }
        yield module.change("waveft", {"spectrum": spectrum}, numbers, transposed=transposed)


def _family(module: Module) -> int:
    """The number of the module's wavelet. Raises NotMergeableError for one without a filter."""
    if not fields.flag(module.config, "use_idwt", default=True):
        return UNFILTERED
    name = module.config.get("wavelet_family") or "db1"
    if name in FAMILIES:
        return FAMILIES.index(name)
    reason = f"{printable(str(name))} has no filter here; there are {', '.join(FAMILIES)}"
    hint = "PEFT itself has none but for coif4 and coif5, where its numbers are not those of the coiflets"
    raise NotMergeableError((f"wavelet_family = {name!r}",), reason, hint)
