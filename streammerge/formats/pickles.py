"""A look at the pickle of a torch file before torch reads it: is it what a state dict is made of, and not too much?

torch's safe unpickler runs no code, and still makes what a pickle asks for: gigabytes of zeros from a number, or the
hash of a tuple that holds itself twice, forty times over. Here the same operations are carried out on stand-ins that
cost nothing. The invariant: what passes asks for nothing but torch's own names, uses no tuple as a key, and takes a
bounded number of steps.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from io import BytesIO
from typing import Any

from streammerge.core.errors import MalformedInputError, UnsafeInputError

UNTRUSTED = "a pickle can run any code; get the checkpoint as safetensors, or convert it where its author is trusted"
MAX_PICKLE, MAX_STEPS = 16_000_000, 600_000
"""Bytes and operations of a pickle; a tensor takes some 150 bytes and 30 operations."""

_OPERATIONS = (
    "PROTO", "STOP", "MARK", "POP", "GLOBAL", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE",
    "SHORT_BINSTRING", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "BINPERSID", "REDUCE", "BUILD", "APPEND",
    "APPENDS", "SETITEM", "SETITEMS",
)  # fmt: skip
"""All that `torch.save` writes for tensors."""
_KEYS = (str, int, float, bool, type(None))

_Step = Callable[[Any], None]


class _Refusal(Exception):
    """A pickle that torch shall not see; the message says why."""


class _StandIn:
    """For whatever a pickle names, makes or refers to: takes everything, and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: object) -> _StandIn:
        if self.name == "collections.OrderedDict" and arguments:
            raise _Refusal("its pickle fills a dict in a way that `torch.save` does not")
        return _StandIn("")

    def __setstate__(self, state: object) -> None:
        """What BUILD calls."""

    def __setitem__(self, key: object, value: object) -> None:
        """What SETITEM calls."""


def check_pickle(data: bytes, path: str) -> None:
    """Raise UnsafeInputError for a pickle that asks for more than torch's own names, MalformedInputError for one that
    is too large, is no pickle, or is not what a state dict is made of."""
    inspector = _Inspector(BytesIO(data))
    try:
        inspector.load()
    except _Refusal as refusal:
        raise MalformedInputError(path, str(refusal)) from None
    except _Unsafe as unsafe:
        raise UnsafeInputError(path, f"its pickle asks for `{unsafe}`", UNTRUSTED) from None
    except Exception as error:  # a broken pickle can make an unpickler raise anything at all
        raise MalformedInputError(path, f"its pickle cannot be read ({type(error).__name__})") from None


class _Unsafe(Exception):
    """A name that is not torch's; the message is the name."""


class _Inspector(pickle._Unpickler):  # the one in Python: that in C takes memory for a number that it reads
    """Carries out a pickle on stand-ins."""

    stack: list[Any]
    steps = 0

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full != "collections.OrderedDict" and module != "torch" and not module.startswith("torch."):
            raise _Unsafe(name if module in ("builtins", "__builtin__") else full)
        return _StandIn(full)

    def persistent_load(self, pid: object) -> Any:
        return _StandIn("")

    def check_key(self, key: object) -> None:
        """Refuse a key whose hash could take for ever."""
        if not isinstance(key, (*_KEYS, _StandIn)):
            raise _Refusal(f"its pickle uses a {type(key).__name__} as a key")


def _counted(name: str, step: _Step) -> _Step:
    """An operation that counts, and looks at keys before they are used."""

    def counted(inspector: _Inspector) -> None:
        inspector.steps += 1
        if inspector.steps > MAX_STEPS:
            raise _Refusal(f"a pickle of more than {MAX_STEPS:,} operations")
        if name == "SETITEM":
            inspector.check_key(inspector.stack[-2])
        elif name == "SETITEMS":
            for key in inspector.stack[::2]:
                inspector.check_key(key)
        step(inspector)

    return counted


def _refused(code: int) -> _Step:
    def refuse(_: _Inspector) -> None:
        raise _Refusal(f"its pickle holds an operation that `torch.save` does not write ({bytes([code])!r})")

    return refuse


_NAMES = {getattr(pickle, name)[0]: name for name in _OPERATIONS}
_Inspector.dispatch = {
    code: _counted(_NAMES[code], step) if code in _NAMES else _refused(code)
    for code, step in pickle._Unpickler.dispatch.items()
}
