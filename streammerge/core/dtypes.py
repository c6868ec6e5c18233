"""The closed table of safetensors dtypes, and numpy access to the float ones without torch.

A dtype is its safetensors name (`BF16`). The widths are those of safetensors 0.8; a name outside the table is still
copied byte for byte where its extent is known, but nothing is ever computed with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
        "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
        "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
        "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    }
)  # fmt: skip
"""Bits of one element."""

FLOATS: frozenset[str] = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes that arithmetic is done on, and that `--dtype` converts."""

INTEGERS: frozenset[str] = frozenset({"U8", "I8", "I16", "I32", "I64"})
"""Dtypes in which adapters keep positions; float64 holds each of them exactly, up to 2^53."""

LOW_BIT: frozenset[str] = frozenset(dtype for dtype in BITS if dtype.startswith(("F8", "F6", "F4")))
"""Dtypes that only quantized checkpoints use."""

BY_OPTION: Mapping[str, str] = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
"""`--dtype` values to safetensors names."""

IN_CONFIG: Mapping[str, str] = MappingProxyType(
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
"""Safetensors names to the values of `dtype` in a config.json."""


def itemsize(dtype: str) -> int:
    """Bytes of one element; raises KeyError for an unknown dtype and ValueError for one of less than a byte."""
    bits = BITS[dtype]
    if bits % 8:
        raise ValueError(f"elements of {dtype} are not whole bytes")
    return bits // 8


def as_numpy(data: memoryview, dtype: str) -> NDArray[np.floating]:
    """The values of a float tensor's bytes as a numpy array, a view where numpy knows the dtype.

    `BF16` is widened to float32 (exact). Raises KeyError for a dtype that is not a float.
    """
    import numpy as np

    if dtype == "BF16":
        words = np.frombuffer(data, np.uint16)
        widened: NDArray[np.float32] = np.left_shift(words, 16, dtype=np.uint32).view(np.float32)
        return widened
    kinds: dict[str, type[np.floating]] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return np.frombuffer(data, kinds[dtype])


def surely_finite(data: memoryview, dtype: str) -> bool:
    """Whether every value is finite, found out several times as fast as by asking each of them; False leaves the
    question open. BF16 is finite below the exponent of all ones; elsewhere a finite sum of squares will do, which very
    large values overflow. Half precision has no product worth the name."""
    import numpy as np

    if dtype == "BF16":
        return not len(data) or int((np.frombuffer(data, np.uint16) & 0x7FFF).max()) < 0x7F80
    if dtype == "F16":
        return False
    values = as_numpy(data, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.dot(values, values)))


def stored_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a float or integer dtype; raises KeyError for any other."""
    import torch

    integers = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
    return integers.get(dtype) or torch_dtype(dtype)


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a float dtype; raises KeyError for one that no arithmetic is done on."""
    import torch

    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
