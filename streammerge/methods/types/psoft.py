"""PSOFT: the principal subspace of a weight turned in itself (PEFT `tuners/psoft/layer.py`, 0.19 to 0.21).

`W' = W + U S (R - I) V` with the top singular triples of W, or `U sqrt(S) (R - I) sqrt(S) V` for `pissa_init`; what
PEFT divides S by, it multiplies the product with. R is orthogonal, `(I + Q) (I - Q)^-1` or the first terms of its
series for a skew-symmetric Q, or free, between two diagonals: `diag(b) R diag(a)` (openreview FSHrinMArK).

Neither U nor V is in the file, and another sign of a pair of them is another result. So the decomposition is the one
that PEFT makes, in float32 on the CPU; a training on a GPU, or with another LAPACK, may have seen other signs. The
random start of `psoft_svd = lowrank` is drawn from a generator of its own, with the numbers that PEFT draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from streammerge.core.errors import ConfigContradictionError
from streammerge.core.tensors import FactorView, Operation
from streammerge.methods import cayley, fields
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.principal import FLOAT32, SVD_COPIES
from streammerge.names.pieces import Cut, Sizes

if TYPE_CHECKING:
    from torch import Tensor

SVDS, INITS = ("full", "lowrank"), ("psoft_init", "pissa_init")
DIAGONALS = ("a", "b")


class Turned(AbsoluteFormula):
    """Factors: `R` (K (K - 1) / 2) of a Q, or (K, K), and perhaps `a` and `b` (K); numbers: `rank`, K, `orthogonal`,
    `terms` of the series or 0, `radius` of Q or 0, `symmetric` for `pissa_init`, `rounds` of the random decomposition
    or -1 for the exact one, and its `seed`."""

    title = "W + U S (R - I) V"

    def locality(self, operation: Operation) -> Locality:
        """The decomposition needs all of W."""
        return Locality.MATRIX

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """The whole matrix."""
        if not (cut.whole_rows and cut.whole_cols):
            raise refuse_part(operation, "the whole matrix")
        return cut.turned(operation.place.transposed), operation.factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The factors of the update, and its part on one tile."""
        return FLOAT64 * (int(operation.numbers["rank"]) * sum(operation.place.shape) + 2 * tile[0] * tile[1])

    def state_memory(self, operation: Operation) -> int:
        """W and its decomposition, and R with what it is made of."""
        rows, cols = operation.place.shape
        return SVD_COPIES * FLOAT32 * rows * cols + 6 * FLOAT64 * int(operation.numbers["rank"]) ** 2

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """The update as float64 factors in stored orientation, (R, K) and (K, C)."""
        import torch

        stored_RC = weight.to(torch.float32).cpu()
        weight_OI = stored_RC.T if operation.place.transposed else stored_RC
        rank, rounds = int(operation.numbers["rank"]), int(operation.numbers["rounds"])
        if rounds < 0:
            u, s, vh = torch.linalg.svd(weight_OI, full_matrices=False)
        else:
            u, s, vh = random_svd(weight_OI, rank, rounds, int(operation.numbers["seed"]))
        u, s, vh = (part.to(torch.float64) for part in (u[:, :rank], s[:rank], vh[:rank]))
        root = s.sqrt() if operation.numbers["symmetric"] else torch.ones_like(s)
        turn = self._turn(operation, factors).to(torch.float64).cpu() - torch.eye(rank, dtype=torch.float64)
        left, right = (u * (s / root)) @ turn, root[:, None] * vh
        parts = (right.T, left.T) if operation.place.transposed else (left, right)
        return tuple(part.to(weight.device).contiguous() for part in parts)

    def _turn(self, operation: Operation, factors: Factors) -> Tensor:
        """R between its diagonals."""
        rank, given = int(operation.numbers["rank"]), factors.vector(operation.factors["R"])
        turn = self._orthogonal(operation, given) if operation.numbers["orthogonal"] else given.view(rank, rank)
        if "b" in operation.factors:
            turn = factors.vector(operation.factors["b"])[:, None] * turn
        return turn * factors.vector(operation.factors["a"])[None, :] if "a" in operation.factors else turn

    def _orthogonal(self, operation: Operation, triangle: Tensor) -> Tensor:
        """`(I + Q) (I - Q)^-1`, or the first terms of its series; PEFT's has no fewer than four once it has three."""
        skew = cayley.skew_of_triangles(triangle[None], int(operation.numbers["rank"]))
        terms, radius = int(operation.numbers["terms"]), operation.numbers["radius"]
        if not terms:
            return cayley.cayley(-skew)[0]
        if radius:
            skew = cayley.within(skew, radius)
        return cayley.neumann(skew, max(terms - 1, 3) if terms > 2 else terms - 1, 1.0 if terms > 2 else 2.0)[0]

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """W and its update."""
        left, right = state
        new: Tensor = weight + left[slice(*region.rows)] @ right[:, slice(*region.cols)]
        return new


def random_svd(matrix: Tensor, rank: int, rounds: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, K), S (K) and V transposed (K, I) as `torch.svd_lowrank` gives them after `torch.manual_seed` (Halko et al.
    2009, algorithm 5.1), but that the generator of the whole process is left alone."""
    import torch

    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    start = torch.randn(tall.shape[1], rank, dtype=tall.dtype, generator=torch.Generator().manual_seed(seed))
    basis = torch.linalg.qr(tall @ start).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(tall.T @ basis).Q
        basis = torch.linalg.qr(tall @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    u = basis @ u
    return (vh.T, s, u.T) if wide else (u, s, vh)


class Psoft(Method):
    """Factors: `psoft_R` (r (r - 1) / 2), or (r, r) where it is free, and perhaps `psoft_R.vector_a` and
    `psoft_R.vector_b` (r)."""

    title = "PSOFT"
    paper = "openreview.net/forum?id=FSHrinMArK"
    only = "psoft"
    known = Known(
        read=frozenset(
            {
                "r", "psoft_alpha", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed", "ab_svd_init", "psoft_orth",
                "psoft_mag_a", "psoft_mag_b", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps",
            }
        ),
        no_consequence=frozenset({"psoft_dropout", "init_weights"}),
    )  # fmt: skip
    modules = (slots("psoft_R", "psoft_R.vector_a psoft_R.vector_b"),)
    formulas = MappingProxyType({"psoft": Turned()})
    layers = "Linear"
    local = "the whole matrix"
    refuses = "weights that are stored in several tensors"
    note = (
        "PSOFT's result depends on the signs of singular vectors, which the file does not hold: they are those of this "
        "machine's LAPACK, as in PEFT's merge on its CPU"
    )

    def shape(self, module: ModuleFactors) -> Sizes:
        """A matrix, of which nothing more is known."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one update."""
        config = module.config
        rank = fields.number(config, "r", 32, whole=True)
        if fields.number(config, "psoft_alpha", 32) <= 0:
            raise fields.wrong("psoft_alpha", config["psoft_alpha"], "a positive number")
        orthogonal = fields.flag(config, "psoft_orth", True)
        factors = {"R": module.vector("psoft_R"), **self._diagonals(module, rank)}
        wanted = rank * (rank - 1) // 2 if orthogonal else rank * rank
        if len(module.target.shape) != 2 or rank > min(module.sizes) or factors["R"].shape != (wanted,):
            raise module.mismatch(f"the config says rank {rank:,}, `psoft_R` has {factors['R'].count:,} values")
        if module.transposed():
            raise module.refused("PEFT has no PSOFT for a Conv1D")
        random = _choice(module, "psoft_svd", SVDS) == 1
        series = fields.flag(config, "use_cayley_neumann")
        numbers = {
            "rank": rank,
            "orthogonal": orthogonal,
            "symmetric": _choice(module, "ab_svd_init", INITS),
            "rounds": fields.number(config, "psoft_svd_lowrank_niter", 10) if random else -1,
            "seed": fields.number(config, "random_seed", 0),
            "terms": fields.number(config, "num_cayley_neumann_terms", 5, whole=True) if series else 0,
            "radius": fields.number(config, "cayley_neumann_eps", 0.0) if series else 0,
        }
        yield module.change("psoft", factors, {name: float(value) for name, value in numbers.items()})

    def _diagonals(self, module: Module, rank: int) -> dict[str, FactorView]:
        """Those that the config says there are."""
        found = {}
        for name in DIAGONALS:
            slot, said = f"psoft_R.vector_{name}", fields.flag(module.config, f"psoft_mag_{name}", True)
            if said != module.has(slot):
                reason = f"the config says `psoft_mag_{name} = {str(said).lower()}`, but `{module.name}` "
                raise ConfigContradictionError(module.keys, f"{reason}{'has no' if said else 'has a'} `{slot}`")
            if said:
                found[name] = view = module.vector(slot)
                if view.shape != (rank,):
                    raise module.mismatch(f"`{slot}` has {view.count:,} values, the config says rank {rank:,}")
        return found


def _choice(module: Module, field: str, known: tuple[str, ...]) -> int:
    """Which of the values that a field can have it has, by default the first."""
    value = module.config.get(field, known[0])
    if value not in known:
        raise fields.wrong(field, value, " or ".join(known))
    return known.index(value)
