"""What PEFT methods mean: how their files are read, and the formulas their operations name.

Two closed tables: `FORMULAS`, the arithmetic a plan may name, and `readers.READERS`, the PEFT types a plan can be made
from. A new method is a file with its formula and one row in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from streammerge.methods.base import Formula, Locality, Region
from streammerge.methods.dora import Dora
from streammerge.methods.lowrank import LowRank, VectorDelta
from streammerge.methods.principal import Principal
from streammerge.methods.token_rows import TokenRows
from streammerge.methods.values import NewValues

FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "lora": LowRank(),
        "bias": VectorDelta(),
        "dora": Dora(),
        "token_rows": TokenRows(),
        "values": NewValues(),
        "pissa": Principal("svd"),
        "olora": Principal("qr"),
    }
)

__all__ = ["FORMULAS", "Formula", "Locality", "Region"]
