"""streammerge: merge PEFT adapters into checkpoints, streaming, right or refused.

    import streammerge as sm

    report = sm.merge("path/to/base", "path/to/adapter", "path/to/output")
    plan = sm.plan("path/to/base", ["adapter-a", "adapter-b"], weights=[1.0, 0.5])

Importing this package loads neither torch nor numpy; they are loaded when they are first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streammerge.api import inspect, merge, plan, status, verify
    from streammerge.core.errors import StreamMergeError
    from streammerge.core.options import Options
    from streammerge.inspection import AdapterStatus
    from streammerge.planning.model import MergePlan
    from streammerge.report import Report
    from streammerge.standing import OutputStatus
    from streammerge.stream import Event

__all__ = [
    "AdapterStatus",
    "Event",
    "MergePlan",
    "Options",
    "OutputStatus",
    "Report",
    "StreamMergeError",
    "inspect",
    "merge",
    "plan",
    "status",
    "verify",
]

_HOMES = {
    "AdapterStatus": "inspection",
    "Event": "stream",
    "MergePlan": "planning.model",
    "Options": "core.options",
    "OutputStatus": "standing",
    "Report": "report",
    "StreamMergeError": "core.errors",
    "inspect": "api",
    "merge": "api",
    "plan": "api",
    "status": "api",
    "verify": "api",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _installed_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"streammerge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _installed_version() -> str:
    """The installed version. The module that knows it takes longer to import than all of this package's front."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("streammerge")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0.0.0"
