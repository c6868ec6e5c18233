"""Which device an option names."""

from __future__ import annotations

import re
from collections.abc import Callable

from streammerge.compute.cuda import CudaDevice, CudaRuntime
from streammerge.compute.lanes import Cpu, Device
from streammerge.core.errors import UsageError
from streammerge.core.text import printable

DeviceMaker = Callable[[], Device]
"""Makes the device when torch is there; called by the first worker that needs it."""
CUDA = re.compile(r"cuda(?::([0-9]{1,9}))?")


def device_of(text: str) -> DeviceMaker:
    """The device that `--device` names. `auto` is the processor: it keeps up with the disk, and its bytes are the same
    everywhere; a GPU is used by who asks for it.

    Raises UsageError for one that is not there.
    """
    if text in ("auto", "cpu"):
        return Cpu
    named = CUDA.fullmatch(text)
    if not named:
        raise UsageError(f"`device` is `{printable(text)}`, not auto, cpu or cuda[:N]")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UsageError(f"`device` is `{text}`, and torch sees no CUDA device", "`--device cpu` needs none")
    number = torch.cuda.current_device() if named[1] is None else int(named[1])
    if number >= count:
        seen = "1 CUDA device" if count == 1 else f"{count} CUDA devices"
        raise UsageError(f"`device` is `{text}`, and torch sees {seen}, counted from 0")
    return lambda: CudaDevice(CudaRuntime(number))
