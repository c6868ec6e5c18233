"""FRoD: `W' = U (S + diag(l)) V^T`, S sparse (doi:10.1609/aaai.v40i31.39813; PEFT
`tuners/frod/layer.py` and `model.py`, as of 0.21.2).

V is the same for all modules that play one role in different layers. U and the l that training starts from come from
the base: `W V^-T = U diag(lambda)` with columns of U of length one, in float64; a column that is zero stays zero. The
role is read from the module's path: its last two names, or one if the other is a number.

V comes from the joint decomposition of the weights of all modules of a role, in an order and with signs that depend on
the machine; an adapter that does not hold it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.methods.base import (
    AbsoluteFormula,
    CutOperation,
    Factors,
    Locality,
    Region,
    refuse_part,
)
from streammerge.methods.blockwise import whole
from streammerge.methods.composed import checked
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Cut, Sizes

if TYPE_CHECKING:
    from torch import Tensor

LEAST_LENGTH = 1e-12
"""Below it PEFT takes a column for zero."""
LEAST_SINGULAR = 1e-6
"""Of the largest one: what PEFT leaves out where V has no inverse."""
WIDE_COPIES, SQUARE_COPIES = 4, 5
"""Matrices (out, in) and (in, in) alive at once."""
PROJECTIONS = ("frod_V", "frod_s_indices", "frod_s_size")


class Reassembled(AbsoluteFormula):
    """Factors: `V` (I, I), `indices` (2, n), `values` (n), `lengths` (I), the l, and
    `size` (2), which says of S what V's shape does."""

    title = "U (S + diag(l)) V^T, U of the weight"

    def locality(self, operation: Operation) -> Locality:
        """The lengths of U's columns need all of W."""
        return Locality.MATRIX

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """The whole matrix."""
        if not (cut.whole_rows and cut.whole_cols):
            raise refuse_part(operation, "the whole matrix")
        return cut.turned(operation.place.transposed), operation.factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The tile; its values are made already."""
        rows, cols = operation.place.shape
        return FLOAT64 * (rows * cols + 2 * tile[0] * tile[1])

    def state_memory(self, operation: Operation) -> int:
        """W, U and their products, V and S."""
        rows, cols = operation.place.shape
        return FLOAT64 * (WIDE_COPIES * rows * cols + SQUARE_COPIES * operation.factors["V"].count)

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """The new values of the place (R, C), in stored orientation."""
        import torch

        transposed = operation.place.transposed
        weight_OI = weight.double().T if transposed else weight.double()
        v_II = whole(operation, "V", factors).double()
        try:
            turned_OI = torch.linalg.solve(v_II, weight_OI.T).T
        except RuntimeError:  # torch's word for a singular matrix
            turned_OI = weight_OI @ torch.linalg.pinv(v_II, rtol=LEAST_SINGULAR).T
        length_I = turned_OI.norm(dim=0)
        u_OI = torch.where(length_I > LEAST_LENGTH, turned_OI / length_I, 0.0)
        middle_II = torch.diag(factors.vector(operation.factors["lengths"]).double())
        rows, cols = checked(whole(operation, "indices", factors), len(v_II), operation)
        middle_II.index_put_((rows, cols), factors.vector(operation.factors["values"]).double(), accumulate=True)
        new_OI = u_OI @ middle_II @ v_II.T
        return (new_OI.T if transposed else new_OI).contiguous()

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """The new values of a region."""
        made: Tensor = state[slice(*region.rows), slice(*region.cols)]
        return made


class Frod(Method):
    """Factors: `frod_lambda_l` (in), `frod_lambda_s_values` (n); of all modules of a role `frod_V.<role>` (in, in),
    `frod_s_indices.<role>` (2, n), `frod_s_size.<role>` (2)."""

    title = "FRoD"
    paper = "doi:10.1609/aaai.v40i31.39813"
    only = "frod"
    known = Known(
        read=frozenset({"save_projection"}),
        # What the projections were made from, and how; they are saved.
        no_consequence=frozenset(
            {
                "projection_prng_key", "frod_dropout", "init_weights", "sparse_rate", "regularization_alpha",
                "progressbar", "runtime_offload_base_weight",
            }
        ),
    )  # fmt: skip
    modules = (slots("frod_lambda_l frod_lambda_s_values"),)
    shared = frozenset(PROJECTIONS)
    positions = frozenset({"frod_s_indices", "frod_s_size"})
    formulas = MappingProxyType({"frod": Reassembled()})
    layers = "Linear, Conv1D"
    local = "the whole matrix"
    refuses = "adapters saved without their projections: those depend on the weights of all modules of a role"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), of which the inputs are known."""
        return None, module.slots["frod_lambda_l"].count

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one new weight."""
        role = role_of(module.name)
        names = [f"{projection}.{role}" for projection in PROJECTIONS]
        if not all(name in module.shared for name in names):
            reason = f"`{module.name}`: the projections of its role `{role}` were not saved, and depend on the weights "
            reason += "of all modules of that role"
            raise NotMergeableError(module.keys, reason, "save the adapter with `save_projection=True`")
        v, indices, size = (module.info(name) for name in names)
        lengths, values = module.vector("frod_lambda_l"), module.vector("frod_lambda_s_values")
        into = lengths.count
        if v.shape != (into, into) or indices.shape != (2, values.count) or size.shape != (2,):
            raise module.mismatch(
                f"`{names[0]}` {list(v.shape)} and `{names[1]}` {list(indices.shape)} do not go with its factors of "
                f"{into:,} and {values.count:,} values"
            )
        factors = {
            "V": module.matrix(names[0]),
            "indices": module.matrix(names[1]),
            "size": module.vector(names[2]),
            "lengths": lengths,
            "values": values,
        }
        yield module.change("frod", factors, transposed=module.transposed(into=into))


def role_of(module: str) -> str:
    """What the modules that share a projection are called: the last two names of the path, or one if the other is a
    number; an attention's `output.dense` is told from that of a feed-forward layer."""
    names = module.split(".")
    if len(names) == 1 or names[-2].isdigit():
        return names[-1]
    if names[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{names[-2]}_{names[-1]}"
