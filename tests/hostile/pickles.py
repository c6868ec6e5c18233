"""Torch files that would run code, or make what no checkpoint holds; as an adapter's weights, and as a base."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tests.hostile.case import CANARY, SHARD, Case, Place, fine, malformed, unsafe
from tests.refusals.making import all_factors, as_torch, base_tensors

START, NAME = b"\x80\x02}", b"X\x01\0\0\0w"


class Call:
    """Unpickled without care, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def canary(place: Place) -> str:
    """A path that only code of a pickle would create."""
    return str(place.root / CANARY)


def touching(place: Place) -> dict[str, Call]:
    """Three ways to a file that should not be."""
    path = canary(place)
    return {
        "os.system": Call(os.system, f"touch {path}"),
        "eval": Call(eval, f"__import__('pathlib').Path({path!r}).touch()"),
        "shutil.copy": Call(shutil.copy, __file__, path),
        "open": Call(open, path, "w"),
    }


def as_adapter(place: Place, data: bytes) -> None:
    """The adapter's weights as a torch file."""
    (place.adapter / "adapter_model.safetensors").unlink()
    place.write("adapter/adapter_model.bin", data)


def as_base(place: Place, data: bytes) -> None:
    """The base as one torch file."""
    for path in place.base.glob("model*"):
        path.unlink()
    place.write("base/pytorch_model.bin", data)


def saved(value: object, **options: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def factors() -> dict[str, torch.Tensor]:
    """A healthy adapter's tensors."""
    return {key: as_torch(value) for key, value in all_factors().items()}


def rebuilt(data: bytes, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A torch file with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as before, zipfile.ZipFile(file, "w", compression) as after:
        for name in before.namelist():
            after.writestr(name, pickled if name.endswith("/data.pkl") else before.read(name))
    return file.getvalue()


def pickled(body: bytes) -> Callable[[Place], None]:
    """An adapter whose pickle is a dict of one value, which `body` makes."""
    return lambda place: as_adapter(place, rebuilt(saved(factors()), START + NAME + body + b"s."))


def called(name: str, argument: bytes) -> bytes:
    """The call of a function with one argument."""
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + argument + b"\x85R"


def number(value: int) -> bytes:
    """A number of eight bytes."""
    return b"\x8a\x08" + struct.pack("<q", value)


def code(kind: str, place_in: Callable[[Place, bytes], None], **options: Any) -> Callable[[Place], None]:
    """A healthy state dict, and among its tensors a call."""
    return lambda place: place_in(place, saved({**factors(), "x": touching(place)[kind]}, **options))


def plain(place: Place) -> None:
    """A pickle and nothing else, under the name of a torch file."""
    as_adapter(place, pickle.dumps(touching(place)["os.system"]))


def script(place: Place) -> None:
    """What TorchScript saves, which holds code."""
    module = torch.nn.Linear(2, 2)
    path = place.root / "temporary" / "script.pt"
    torch.jit.save(torch.jit.trace(module, torch.zeros(1, 2)), path)
    as_base(place, path.read_bytes())
    path.unlink()


def members(count: int) -> Callable[[Place], None]:
    """An archive of very many empty files."""

    def spoil(place: Place) -> None:
        names = [f"{n:x}".encode() for n in range(count)]
        directory = b"".join(
            struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", *[0] * 4, *[0] * 4, 0, 0, 0, len(name), *[0] * 6) + name
            for name in names
        )
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, len(directory), 64, 0)
        as_adapter(place, b"PK\x03\x04" + bytes(60) + directory + end)

    return spoil


def shared(place: Place) -> None:
    """A healthy torch file, for comparison."""
    as_adapter(place, saved(factors()))


def in_link(place: Place) -> None:
    """A torch file outside, behind a link."""
    (place.adapter / "adapter_model.safetensors").unlink()
    (place.outside / "adapter_model.bin").write_bytes(saved(factors()))
    place.link("adapter/adapter_model.bin", "../outside/adapter_model.bin")


def index_of(place: Place) -> None:
    """An index of safetensors that names a pickle, with the same names in it."""
    tensors = {key: as_torch(value) for key, value in base_tensors().items()}
    place.write("base/model.bin", saved({**tensors, "x": touching(place)["os.system"]}))
    (place.base / SHARD).unlink()
    place.index(lambda found: found.update(dict.fromkeys(found, "model.bin")))


BYTES = b"cbuiltins\nbytearray\n"
TWICE = b"(K\x01K\x02tq\x00" + b"h\x00h\x00\x86q\x00" * 60
BOMBS: dict[str, tuple[Callable[[Place], None], str]] = {
    "a key that holds itself 2^60 times": (pickled(TWICE + b"K\x01s" + NAME + b"N"), "uses a tuple as a key"),
    "a dict in the call that makes it": (
        pickled(called("collections.OrderedDict", b"(K\x01K\x02t")),
        "fills a dict in a way",
    ),
    "a list for a dict's call": (pickled(called("collections.OrderedDict", b"]")), "fills a dict in a way"),
    "two million operations": (pickled(b"N0" * 1_000_000 + b"N"), "more than 600,000 operations"),
    "500,000 dicts": (pickled(b"](" + b"}" * 500_000 + b"e"), "`w` (list)"),
    "a pickle of 17 MB": (pickled(b"X" + struct.pack("<I", 17_000_000) + b"x" * 17_000_000), "17,000,"),
    "a text that says it has 4 GB": (pickled(b"X\xff\xff\xff\xff"), "cannot be read"),
    "a number of 255 bytes": (pickled(b"\x8a\xff" + b"\x7f" * 255), "`w` (int)"),
    "a number as text": (pickled(b"I" + b"9" * 100_000 + b"\n"), "operation that `torch.save` does not write"),
    "a memory of 2^32 places": (pickled(b"Nr\xff\xff\xff\xff"), "`w` (NoneType)"),
    "a frame of 2^62 bytes": (pickled(b"\x95" + struct.pack("<Q", 2**62)), "operation that"),
    "an object without its call": (pickled(b"ctorch\nTensor\n)\x81"), "operation that"),
    "nothing": (lambda place: as_adapter(place, rebuilt(saved(factors()), b"")), "cannot be read"),
    "a call without a function": (pickled(b"K\x01)R"), "cannot be read"),
    "a tensor of 2^62 bytes": (pickled(called("torch.Tensor", number(2**60))), "torch cannot read it"),
    "a pickle that is compressed": (
        lambda place: as_adapter(place, rebuilt(saved(factors()), bytes(50_000_000), zipfile.ZIP_DEFLATED)),
        "is compressed",
    ),
    "60,000 members": (members(60_000), "not the archive of `torch.save`"),
    "100,000 members": (members(100_000), "at most 4,000,000 are read"),
    "cut off": (lambda place: as_adapter(place, saved(factors())[:-100]), "zip directory cannot be read"),
    "an old file": (code("os.system", as_adapter, _use_new_zipfile_serialization=False), "not a zip archive"),
    "a pickle alone": (plain, "not a zip archive"),
    "safetensors under its name": (lambda place: as_adapter(place, (place.base / SHARD).read_bytes()), "not a zip"),
}
ASKS = {
    "a gigabyte of zeros": (called("builtins.bytearray", number(10**9)), "bytearray"),
    "a set": (called("builtins.set", b"]"), "set"),
    "a counter": (called("collections.Counter", b"}"), "collections.Counter"),
    "an encoding": (called("_codecs.encode", b"X\x01\0\0\0a"), "_codecs.encode"),
    "a way to other modules": (called("importlib.import_module", b"X\x02\0\0\0os"), "importlib.import_module"),
    "a name with an escape sequence": (called("a\x1b[2J.b", b"N"), "a\\x1b[2J.b"),
}
CASES: tuple[Case, ...] = (
    *(unsafe(f"pickle: {kind}, in an adapter", code(kind, as_adapter), "asks for") for kind in ("os.system", "eval")),
    *(unsafe(f"pickle: {kind}, in a base", code(kind, as_base), "asks for") for kind in ("shutil.copy", "open")),
    malformed("pickle: os.system, by another protocol", code("os.system", as_base, pickle_protocol=5), "b'\\x95'"),
    unsafe("pickle: os.system, in an index of safetensors", index_of, "asks for"),
    unsafe("pickle: TorchScript", script, "holds code"),
    unsafe("pickle: behind a link", in_link, "a link that leads out"),
    *(unsafe(f"pickle: it asks for {name}", pickled(body), asked) for name, (body, asked) in ASKS.items()),
    *(malformed(f"pickle: {name}", spoil, words) for name, (spoil, words) in BOMBS.items()),
    fine("pickle: nothing is wrong", shared),
)
