"""Which device an option names."""

from __future__ import annotations

from collections.abc import Callable

from streammerge.compute.lanes import Cpu, Device
from streammerge.core.errors import UsageError

DeviceMaker = Callable[[], Device]
"""Makes the device when torch is there; called by the first worker that needs it."""


def device_of(text: str) -> DeviceMaker:
    """The device that `--device` names. Raises UsageError for one that is not there."""
    if text.startswith("cuda"):
        raise UsageError(f"`--device {text}` is not supported yet", "the arithmetic is done on the CPU: `--device cpu`")
    return Cpu
