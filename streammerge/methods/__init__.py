"""What PEFT methods mean: how their files are read, and the formulas their operations name.

Two closed tables: `METHODS`, the PEFT types a plan can be made from beside LoRA, and `FORMULAS`, the arithmetic a plan
may name. A new method is a file with its declaration and its formula, and one row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from streammerge.methods.base import Formula, Locality, Region
from streammerge.methods.dora import Dora
from streammerge.methods.lora_variants import BlockDiagonal
from streammerge.methods.lowrank import LowRank, VectorDelta
from streammerge.methods.method import Method
from streammerge.methods.principal import Principal
from streammerge.methods.token_rows import TokenRows
from streammerge.methods.types.adalora import AdaLora
from streammerge.methods.types.beft import Beft
from streammerge.methods.types.boft import Boft
from streammerge.methods.types.c3a import C3a
from streammerge.methods.types.deft import Deft
from streammerge.methods.types.delora import DeLora
from streammerge.methods.types.fourierft import FourierFt
from streammerge.methods.types.frod import Frod
from streammerge.methods.types.glora import Glora
from streammerge.methods.types.gralora import GraLora
from streammerge.methods.types.hira import Hira
from streammerge.methods.types.hra import Hra
from streammerge.methods.types.ia3 import Ia3
from streammerge.methods.types.ln_tuning import LnTuning
from streammerge.methods.types.loha import LoHa
from streammerge.methods.types.lokr import LoKr
from streammerge.methods.types.miss import Bone, Miss
from streammerge.methods.types.oft import Oft
from streammerge.methods.types.osf import Osf
from streammerge.methods.types.peanut import Peanut
from streammerge.methods.types.psoft import Psoft
from streammerge.methods.types.randlora import RandLora
from streammerge.methods.types.road import Road
from streammerge.methods.types.shira import Shira
from streammerge.methods.types.supertuning import Supertuning
from streammerge.methods.types.tinylora import TinyLora
from streammerge.methods.types.trainable_tokens import TrainableTokens
from streammerge.methods.types.unilora import UniLora
from streammerge.methods.types.vblora import VbLora
from streammerge.methods.types.vera import PVera, Vera
from streammerge.methods.types.waveft import WaveFt
from streammerge.methods.values import NewValues

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "ADALORA": AdaLora(),
        "BEFT": Beft(),
        "BOFT": Boft(),
        "BONE": Bone(),
        "C3A": C3a(),
        "DEFT": Deft(),
        "DELORA": DeLora(),
        "FOURIERFT": FourierFt(),
        "FROD": Frod(),
        "GLORA": Glora(),
        "GRALORA": GraLora(),
        "HIRA": Hira(),
        "HRA": Hra(),
        "IA3": Ia3(),
        "LN_TUNING": LnTuning(),
        "LOHA": LoHa(),
        "LOKR": LoKr(),
        "MISS": Miss(),
        "OFT": Oft(),
        "OSF": Osf(),
        "PEANUT": Peanut(),
        "PSOFT": Psoft(),
        "PVERA": PVera(),
        "RANDLORA": RandLora(),
        "ROAD": Road(),
        "SHIRA": Shira(),
        "SUPERTUNING": Supertuning(),
        "TINYLORA": TinyLora(),
        "TRAINABLE_TOKENS": TrainableTokens(),
        "UNILORA": UniLora(),
        "VBLORA": VbLora(),
        "VERA": Vera(),
        "WAVEFT": WaveFt(),
    }
)

FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "lora": LowRank(),
        "bias": VectorDelta(),
        "dora": Dora(),
        "token_rows": TokenRows(),
        "values": NewValues(),
        "pissa": Principal("svd"),
        "olora": Principal("qr"),
        "kasa_rest": Principal("tail"),
        "kasa": LowRank("W + scaling * B @ diag(D) @ A"),
        "bdlora": BlockDiagonal(),
        **{name: formula for method in METHODS.values() for name, formula in method.formulas.items()},
    }
)

__all__ = ["FORMULAS", "METHODS", "Formula", "Locality", "Method", "Region"]
