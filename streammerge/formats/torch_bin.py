"""Where the tensors of a torch `.bin` file lie, so that the rest of the package maps the bytes itself.

Such a file is a zip archive of uncompressed storages and a pickle that says which tensor views which storage. Only
torch's safe unpickler reads the pickle; the offsets come from the zip directory. The one invariant: every storage that
torch found in its own mapping of the file is, in place and size, one member of the archive, and every member is used,
so that neither a crafted archive nor a change in torch can make an offset point elsewhere without an error.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO

from streammerge.core import io
from streammerge.core.dtypes import itemsize
from streammerge.core.errors import InputReadError, MalformedInputError, UnsafeInputError
from streammerge.core.tensors import TensorInfo
from streammerge.core.text import SHOWN, printable
from streammerge.formats.pickles import MAX_PICKLE, UNTRUSTED, check_pickle
from streammerge.formats.safetensors import foreign_format, quoted, tensor_name_problem

if TYPE_CHECKING:
    import torch

CONVERT = """convert it once with
  state = torch.load("pytorch_model.bin", weights_only=True, map_location="cpu")
  state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
  safetensors.torch.save_file(state, "model.safetensors", metadata={"format": "pt"})"""
"""The recipe in hints, for files torch's safe loader takes and we cannot map."""
SAFE_TORCH = "2.6"
"""Before it `weights_only=True` could be made to run code (CVE-2025-32434)."""
MAX_DIRECTORY = 4_000_000
"""Bytes of a zip directory; a tensor takes some 80."""

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "torch.bool": "BOOL", "torch.uint8": "U8", "torch.int8": "I8", "torch.uint16": "U16", "torch.int16": "I16",
        "torch.uint32": "U32", "torch.int32": "I32", "torch.uint64": "U64", "torch.int64": "I64",
        "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32", "torch.float64": "F64",
        "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
        "torch.float8_e4m3fnuz": "F8_E4M3FNUZ", "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    }
)  # fmt: skip
"""torch dtypes to safetensors names; complex, quantized and sub-byte ones are not here and are refused."""

_ZIP_START = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<26xHH")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")
_LOADER_SAYS = re.compile(r"WeightsUnpickler error: ([^\n]+)")
_SYSTEM_SAYS = re.compile(r"unable to .*: ([^:]+) \(\d+\)|(file read failed)")
"""What torch says when a file cannot be opened or mapped, with the number of the error at the end, or be read."""


def read_torch_bin(path: str | os.PathLike[str], file: str) -> tuple[TensorInfo, ...]:
    """The tensors of the file at `path`, in the order of their bytes; `file` is its name inside the checkpoint.

    A storage that several names share gives one TensorInfo each, at the same bytes. `strides` is given for tensors
    that do not lie row-major, and may hold zeros (expanded tensors). Raises UnsafeInputError for a pickle that asks
    for more than tensors, MalformedInputError for what cannot be mapped.
    """
    shown = os.fspath(path)
    fd = io.open_input(path)
    try:
        members = _storage_members(fd, shown)
    finally:
        io.close(fd)
    tensors = _tensors(_load(shown), shown)
    base = _mapping_base(tensors.values(), members, shown)
    infos = [_info(name, tensor, file, base, shown) for name, tensor in tensors.items()]
    return tuple(sorted(infos, key=lambda info: info.start))


# --- the archive ----------------------------------------------------------------------------------------------------
def _storage_members(fd: int, path: str) -> dict[int, int]:
    """Offset to size of every storage in the archive that is not empty, after the archive is known to be plain."""
    start = bytes(io.read_at(fd, path, 0, min(16, io.state_of(fd, path).size)))
    foreign = foreign_format(start)
    if foreign:
        raise MalformedInputError(path, *foreign)
    if not start.startswith(_ZIP_START):
        raise MalformedInputError(path, "not a zip archive, so not a torch file, or one from before torch 1.6", CONVERT)
    infos, directory = _directory(fd, path)
    folder = infos[0].filename.partition("/")[0]
    names = {info.filename for info in infos}
    if f"{folder}/constants.pkl" in names:
        raise UnsafeInputError(path, "a TorchScript archive, which holds code", UNTRUSTED)
    if f"{folder}/data.pkl" not in names or len(names) < len(infos):
        raise MalformedInputError(path, "not the archive of `torch.save`: no `data.pkl`, or a name that stands twice")
    storages: dict[int, int] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        offset = _data_offset(fd, path, info, directory)
        if info.header_offset < end or offset + info.file_size > directory:
            raise MalformedInputError(path, f"archive member {quoted(info.filename)} overlaps its neighbour")
        end = offset + info.file_size
        _check_record(fd, path, info.filename.removeprefix(f"{folder}/"), (offset, info.file_size))
        if info.filename.startswith(f"{folder}/data/") and info.file_size:
            storages[offset] = info.file_size
    return storages


def _check_record(fd: int, path: str, record: str, extent: tuple[int, int]) -> None:
    """The two records besides the storages that decide whether the file can be mapped; `extent` is offset and size."""
    offset, size = extent
    if record == "data.pkl" and size > MAX_PICKLE:
        raise MalformedInputError(path, f"a pickle of {size:,} bytes, at most {MAX_PICKLE:,} are read")
    if record == "data.pkl":
        check_pickle(bytes(io.read_at(fd, path, offset, size)), path)
    if record == "byteorder" and bytes(io.read_at(fd, path, offset, min(size, 16))) != b"little":
        raise MalformedInputError(path, "its tensors are not stored little-endian", CONVERT)


def _directory(fd: int, path: str) -> tuple[list[zipfile.ZipInfo], int]:
    """The members of the archive and the offset of its directory, which lies behind all of them."""
    parts: _InParts | None = None
    try:
        with io.input_stream(fd, path) as stream:
            parts = _InParts(stream)
            with zipfile.ZipFile(parts) as archive:
                infos, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError, struct.error) as error:
        if parts and parts.failure:
            with io.reading(path, "read"):
                raise parts.failure from None
        advice = "the file looks truncated; download or save it again"
        raise MalformedInputError(path, f"its zip directory cannot be read: {error}", advice) from None
    # Bytes before the first member would shift every offset, by an amount that readers of zip files disagree on.
    if not infos or min(info.header_offset for info in infos) != 0:
        raise MalformedInputError(path, "its zip archive does not start at the first byte, or is empty")
    return infos, directory


class _InParts:
    """A stream of which not too much is read at once: a zip directory says itself how long it is. `failure` is what the
    disk failed with, which zipfile takes for the end of a file that is no archive."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell, self.seekable, self._read = stream.seek, stream.tell, stream.seekable, stream.read
        self.failure: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        """Raise BadZipFile for more than a directory may have."""
        if size > MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"it would have {size:,} bytes, at most {MAX_DIRECTORY:,} are read")
        try:
            return self._read(size)
        except OSError as error:
            self.failure = error
            raise


def _data_offset(fd: int, path: str, info: zipfile.ZipInfo, directory: int) -> int:
    """Where the bytes of an uncompressed member start; the local header says, the directory does not."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise MalformedInputError(path, f"archive member {quoted(info.filename)} is compressed or encrypted", CONVERT)
    header = io.read_at(fd, path, info.header_offset, min(_LOCAL_HEADER.size, max(0, directory - info.header_offset)))
    if not header.startswith(_ZIP_START) or len(header) < _LOCAL_HEADER.size:
        raise MalformedInputError(path, f"archive member {quoted(info.filename)} is not where the directory says")
    name_size, extra_size = _LOCAL_HEADER.unpack(header)
    return info.header_offset + _LOCAL_HEADER.size + int(name_size) + int(extra_size)


# --- the pickle -----------------------------------------------------------------------------------------------------
def _load(path: str) -> object:
    """What the pickle holds, its tensors being views of torch's own mapping of the file."""
    import torch

    # Not a comparison of strings: torch's version type reads the numbers.
    if torch.__version__ < SAFE_TORCH:
        advice = "upgrade torch, or get the checkpoint as safetensors"
        raise UnsafeInputError(path, f"torch {torch.__version__} can be made to run code by a `.bin` file", advice)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # Of torch's text only these parts are shown: the rest advises to load the file without the safe unpickler.
        wanted, says = _GLOBAL.search(str(error)), _LOADER_SAYS.search(str(error))
        reason = f"its pickle asks for `{wanted[1]}`" if wanted else "torch's safe unpickler refuses its pickle"
        reason += f" ({says[1]})" if says and not wanted else ""
        raise UnsafeInputError(path, reason, UNTRUSTED) from None
    except OSError as error:
        raise InputReadError(path, "map", error.strerror or str(error)) from error
    except Exception as error:  # a broken pickle can make the unpickler raise anything at all
        if system := _SYSTEM_SAYS.search(str(error)):
            raise InputReadError(path, "map" if system[1] else "read", system[1] or system[2]) from error
        reason = f"torch cannot read it ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        raise MalformedInputError(path, reason) from None


def _tensors(loaded: object, path: str) -> dict[str, torch.Tensor]:
    """`loaded` as a flat state dict of plain tensors."""
    import torch

    if not isinstance(loaded, dict):
        advice = "save its tensors under their names with `safetensors.torch.save_file`"
        raise MalformedInputError(path, f"it holds a {type(loaded).__name__} where a state dict should be", advice)
    strangers = {name: value for name, value in loaded.items() if not isinstance(value, torch.Tensor)}
    if strangers:
        found = [f"{quoted(str(name))} ({type(value).__name__})" for name, value in strangers.items()]
        more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
        nested = next((str(name) for name, value in strangers.items() if isinstance(value, dict)), None)
        which = "the dict of tensors" if nested is None else f"the dict under {printable(quoted(nested))}"
        reason = f"it is not a flat dict of names and tensors, it also holds {', '.join(found[:SHOWN])}{more}"
        raise MalformedInputError(path, reason, f"save {which} alone with `safetensors.torch.save_file`")
    for name, tensor in loaded.items():
        if not isinstance(name, str):
            raise MalformedInputError(path, f"a tensor has a name of type {type(name).__name__}")
        problem = tensor_name_problem(name) or _tensor_problem(name, tensor)
        if problem:
            raise MalformedInputError(path, problem)
    return loaded


def _tensor_problem(name: str, tensor: torch.Tensor) -> str | None:
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"tensor {quoted(name)} is a {type(tensor).__name__}, not a plain tensor"
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout)
        return f"tensor {quoted(name)} is not dense ({layout})"
    if str(tensor.dtype) not in DTYPES:
        return f"tensor {quoted(name)} is of {tensor.dtype}, which is not read from `.bin` files"
    if tensor.device.type != "cpu":
        return f"tensor {quoted(name)} has no bytes in the file ({tensor.device})"
    if tensor.is_neg():
        return f"tensor {quoted(name)} is stored with its sign flipped"
    return None


# --- the two together -----------------------------------------------------------------------------------------------
def _mapping_base(tensors: Iterable[torch.Tensor], members: Mapping[int, int], path: str) -> int:
    """The address of byte 0 of the file in torch's mapping, once storages and archive members are the same set."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    mapped = {(storage.data_ptr(), storage.nbytes()) for storage in storages if storage.nbytes()}
    base = min((address for address, _ in mapped), default=0) - min(members, default=0)
    if {(address - base, size) for address, size in mapped} != set(members.items()):
        reason = f"its pickle uses {len(mapped):,} storages that are not the {len(members):,} of its zip directory"
        raise MalformedInputError(path, reason, CONVERT)
    return base


def _info(name: str, tensor: torch.Tensor, file: str, base: int, path: str) -> TensorInfo:
    dtype, shape, strides = DTYPES[str(tensor.dtype)], tuple(tensor.shape), tuple(tensor.stride())
    if tensor.numel() == 0:
        return TensorInfo(name, dtype, shape, file, 0, 0)
    storage, size = tensor.untyped_storage(), itemsize(dtype)
    first = int(tensor.storage_offset()) * size
    last = first + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) * size
    if first < 0 or last + size > storage.nbytes():
        reason = f"tensor {quoted(name)} reaches beyond its storage of {storage.nbytes():,} bytes"
        raise MalformedInputError(path, reason)
    start, nbytes = storage.data_ptr() - base + first, tensor.numel() * size
    return TensorInfo(name, dtype, shape, file, start, nbytes, None if tensor.is_contiguous() else strides)
