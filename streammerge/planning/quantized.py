"""Telling a quantized base by its config and by the companions of its weights. Such a base is refused for now.

Names win over dtypes: packed weights are also stored under 16-bit dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.core.dtypes import LOW_BIT
from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import TensorInfo

COMPANIONS: Mapping[str, str] = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "weight_packed": "compressed-tensors",
    "weight_scale_inv": "block FP8",
    "weight_scale_2": "NVFP4",
    "weight_scale": "FP8",
    "SCB": "bitsandbytes int8",
    "W_q": "HQQ",
    "_weight_qdata": "torchao",
    "quant_map": "bitsandbytes 4-bit",
}
"""Last name segments that only quantized checkpoints have."""
ADVICE = "merge into the 16-bit checkpoint that it was quantized from, then quantize the result"


def refuse_quantized(config: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise NotMergeableError naming the scheme, if this base is quantized."""
    for field in ("quantization_config", "compression_config"):
        section = (config or {}).get(field)
        if section:
            method = section.get("quant_method", "unknown") if isinstance(section, Mapping) else "unknown"
            raise NotMergeableError((field,), f"the base is quantized ({method}): that is not supported yet", ADVICE)
    for name in tensors:
        last = name.rpartition(".")[2]
        scheme = COMPANIONS.get(last) or ("bitsandbytes 4-bit" if "quant_state" in name else None)
        scheme = scheme or (
            "MXFP4" if last.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors else None
        )
        if scheme:
            raise NotMergeableError((name,), f"the base is quantized ({scheme}): that is not supported yet", ADVICE)


def refuse_low_bit(info: TensorInfo) -> None:
    """Raise NotMergeableError for a target whose dtype only quantized checkpoints use, or that is no float."""
    kind = "a quantized dtype" if info.dtype in LOW_BIT else "not a float dtype"
    raise NotMergeableError(
        (info.name,), f"the adapter changes `{info.name}`, which is stored as {info.dtype}: {kind}", ADVICE
    )
