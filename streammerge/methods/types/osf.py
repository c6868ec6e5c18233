"""OSF: the lowest singular part of a weight trained by itself (Nayak et al. 2025, arXiv:2504.07097).

`W' = W - U_0 diag(S_0) V_0 + U diag(S) V`, where U_0, S_0 and V_0 are as many of W's lowest singular triples as the
file has (PEFT `tuners/osf/layer.py`, 0.18 to 0.21). What is taken out does not depend on the signs of singular vectors.
PEFT holds it in the base's dtype; here it is not rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from streammerge.methods.fields import Known
from streammerge.methods.lowrank import LowRank
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.principal import Principal

PREFIX = "osf_svd_params"


class Osf(Method):
    """Factors: `osf_svd_params.U_low` (out, k), `.S_low` (k), `.V_low` (k, in)."""

    title = "OSF"
    paper = "arXiv:2504.07097"
    only = "osf"
    # How many triples were trained, the file's shapes say.
    known = Known(no_consequence=frozenset({"effective_rank", "rank_pattern", "init_weights", "target_svd_config"}))
    modules = (slots(f"{PREFIX}.U_low {PREFIX}.S_low {PREFIX}.V_low"),)
    formulas = MappingProxyType({"osf_rest": Principal("tail"), "osf": LowRank("W + U @ diag(S) @ V")})
    layers = "Linear"
    local = "the whole matrix"
    refuses = "weights that are stored in several tensors"

    def shape(self, module: ModuleFactors) -> tuple[int, int]:
        """(out, in)."""
        return module.slots[f"{PREFIX}.U_low"].shape[0], module.slots[f"{PREFIX}.V_low"].shape[-1]

    def effects(self, module: Module) -> Iterator[Effect]:
        """The lowest part taken out, and the trained one put in its place."""
        left, right = module.matrix(f"{PREFIX}.U_low"), module.matrix(f"{PREFIX}.V_low")
        middle = module.vector(f"{PREFIX}.S_low")
        rank = middle.shape[0]
        if left.shape[1] != rank or right.shape[0] != rank or rank > min(left.shape[0], right.shape[1]):
            raise module.mismatch(f"`U_low`, `S_low` and `V_low` are not of one rank of {rank:,}")
        transposed = module.transposed(left.shape[0], right.shape[1])
        yield module.change("osf_rest", {}, {"rank": float(rank), "scaling": 1.0}, transposed=transposed)
        yield module.product("osf", left, right, 1.0, vectors={"middle": middle})
