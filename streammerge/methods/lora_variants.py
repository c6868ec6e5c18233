"""BD-LoRA, a LoRA of which one factor is block-diagonal (PEFT `tuners/lora/variants.py`, 0.18 to 0.21).

Only the blocks on the diagonal are in the file, stacked: N blocks of A as (r, in / N), N blocks of B as (out, r / N).
Which factor it is, parts of the module's path say: `use_bdlora` in the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.core.errors import ConfigContradictionError
from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise, whole
from streammerge.methods.parts import ModuleFactors

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """What `use_bdlora` says: parts of paths whose A, and of those whose B, is block-diagonal, of `count` blocks;
    `strict`, that every module has one or the other."""

    a: tuple[str, ...]
    b: tuple[str, ...]
    count: int
    strict: bool

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Blocks | None:
        """Of a config; None where it has none. Raises ConfigContradictionError for a field of another kind."""
        value = raw.get("use_bdlora")
        if not fields.is_set(value):
            return None
        if not isinstance(value, Mapping) or value.keys() - {*(f"target_modules_bd_{x}" for x in "ab"), *NUMBERS}:
            raise fields.wrong("use_bdlora", value, f"an object of target_modules_bd_a, target_modules_bd_b, {NUMBERS}")
        a, b = (fields.names(value, f"target_modules_bd_{x}") for x in "ab")
        return cls(a, b, fields.number(value, "nblocks", 1, whole=True), fields.flag(value, "match_strict", True))

    def side(self, module: ModuleFactors) -> str | None:
        """`A` or `B`, whichever factor of a linear layer is block-diagonal, None for neither.

        Raises ConfigContradictionError where PEFT would not load the module.
        """
        if "lora_A" not in module.slots or len(module.slots["lora_A"].shape) != 2:
            return None
        found = [side for side, parts in (("A", self.a), ("B", self.b)) if any(part in module.module for part in parts)]
        if len(found) == 1 or (not found and not self.strict):
            return found[0] if found else None
        number = "both" if found else "neither"
        reason = f"BD-LoRA: `{module.module}` is named by {number} of `target_modules_bd_a` and `target_modules_bd_b`"
        raise ConfigContradictionError(("use_bdlora",), reason)


NUMBERS = ("nblocks", "match_strict")


class BlockDiagonal(Blockwise):
    """Factors: `A` (K, I) or its blocks (K, I / N), `B` (O, K) or its blocks (O, K / N); numbers: `blocks`, N, and
    `of_a`, 1 where A is the one in blocks."""

    title = "W + scaling * B @ A, one of them block-diagonal"
    zero_if = ("A", "B")

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """Block n of A meets columns n of B and inputs n; block n of B meets rows n of A and outputs n."""
        a_KI, b_OK = (whole(operation, name, factors) for name in "AB")
        count = int(operation.numbers["blocks"])
        of_a = bool(operation.numbers["of_a"])
        size = a_KI.shape[1] if of_a else b_OK.shape[0] // count
        ranks = a_KI.shape[0] // count
        made = a_KI.new_zeros(len(outs), len(ins))
        for number in range(count):
            rank = slice(number * ranks, (number + 1) * ranks)
            if of_a:
                here = ins // size == number
                made[:, here] = b_OK[outs][:, rank] @ a_KI[rank][:, ins[here] % size]
            else:
                here = outs // size == number
                made[here] = b_OK[outs[here]] @ a_KI[rank][:, ins]
        return made
