"""Bytes of tensors out of open weight files: by mapping, or by positional reads where mapping is unsafe.

A file's size and modification time are checked again at every read, so that one which shrinks or changes under us is
an error message. At most a handful of files are open at a time; a reader holds what it was handed as long as it needs.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

from streammerge.core import io
from streammerge.core.dtypes import itemsize
from streammerge.core.errors import InputReadError
from streammerge.core.tensors import TensorInfo

OPEN_FILES = 4
COMPARED = 4 * 2**20
"""Bytes of two tensors that are compared at a time."""


class _OpenFile:
    """One open weight file; closed when the last view of it is gone."""

    def __init__(self, path: Path, mapped: bool) -> None:
        self.path = str(path)
        self.fd = io.open_input(path)
        self.state = io.state_of(self.fd, self.path)
        self.mapping: mmap.mmap | None = (
            io.map_input(self.fd, self.path, self.state.size) if mapped and self.state.size else None
        )

    def check(self, before: io.FileState | None = None) -> None:
        """Raise InputReadError if the file is no longer what was opened, or what was opened `before`."""
        now, then = io.state_of(self.fd, self.path), before or self.state
        if now != then:
            sizes = f"it had {then.size:,} bytes and has {now.size:,} now"
            reason = sizes if now.size != then.size else "it was modified"
            raise InputReadError(self.path, "read", f"the file changed while it was being used: {reason}")

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            io.close(self.fd)


class TensorFiles:
    """Reads tensors of the weight files below one directory. `mode` is `mmap`, `pread`, or `auto`: `pread` on network
    file systems and where an address-space limit leaves no room, else `mmap`."""

    def __init__(self, root: Path, mode: str) -> None:
        self.root = root
        self.mapped = mode == "mmap" or (mode == "auto" and not io.is_on_network(root))
        self._auto = mode == "auto"
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._first: dict[str, io.FileState] = {}
        self._lock = threading.Lock()

    def read(self, info: TensorInfo, start: int, end: int) -> memoryview:
        """Bytes [start, end) of the tensor in row-major order; a view of the mapping where that is possible."""
        if info.strides is not None:
            return self._gather(info, start, end)
        return self._bytes(info.file, info.start + start, info.start + end)

    def give_back(self, info: TensorInfo, start: int, end: int) -> None:
        """Let the pages of these bytes go, where they are contiguous; whoever still reads them faults them in again."""
        if info.strides is None:
            file = self._file(info.file)
            if file.mapping is not None:
                io.give_back(file.mapping, info.start + start, info.start + end)

    def raw(self, name: str, start: int, end: int) -> bytearray:
        """Bytes [start, end) of a file, never mapped: a touch of a mapping may map a huge page, 2 MiB for a sample."""
        file = self._file(name)
        file.check()
        return io.read_at(file.fd, file.path, start, end - start)

    def size(self, name: str) -> int:
        """Bytes of a file, as when it was opened."""
        return self._file(name).state.size

    def _bytes(self, name: str, start: int, end: int) -> memoryview:
        file = self._file(name)
        file.check()
        if end > file.state.size:
            raise InputReadError(file.path, "read", f"{end:,} bytes were expected, the file has {file.state.size:,}")
        if file.mapping is not None:
            return memoryview(file.mapping)[start:end]
        return memoryview(io.read_at(file.fd, file.path, start, end - start))

    def _file(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._opened(self.root / name)
                file.check(self._first.setdefault(name, file.state))
                self._open[name] = file
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            return file

    def _opened(self, path: Path) -> _OpenFile:
        try:
            return _OpenFile(path, self.mapped)
        except InputReadError as error:
            if not (self._auto and self.mapped and error.operation == "map"):
                raise
            self.mapped = False
            return _OpenFile(path, False)

    def _gather(self, info: TensorInfo, start: int, end: int) -> memoryview:
        """Row-major bytes of a strided tensor: whole rows of its first axis are gathered, then cut."""
        import numpy as np

        width = itemsize(info.dtype)
        strides = info.strides or ()
        row = math.prod(info.shape[1:]) * width
        first, last = start // row, -(-end // row)
        reach = sum((n - 1) * step for n, step in zip(info.shape[1:], strides[1:], strict=True))
        low, high = first * strides[0], (last - 1) * strides[0] + reach + 1
        data = self._bytes(info.file, info.start + low * width, info.start + high * width)
        flat = np.frombuffer(data, np.dtype(f"V{width}"))
        steps = tuple(step * width for step in strides)
        rows = np.lib.stride_tricks.as_strided(flat, (last - first, *info.shape[1:]), steps, writeable=False)
        return np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data[start - first * row : end - first * row]


def same_bytes(a: tuple[TensorFiles, TensorInfo], b: tuple[TensorFiles, TensorInfo]) -> bool:
    """Whether two stored tensors are the same bytes under the same dtype and shape."""
    (files_a, info_a), (files_b, info_b) = a, b
    if (info_a.dtype, info_a.shape) != (info_b.dtype, info_b.shape):
        return False
    if files_a is files_b and replace(info_a, name=info_b.name) == info_b:
        return True
    for start in range(0, info_a.nbytes, COMPARED):
        end = min(start + COMPARED, info_a.nbytes)
        if files_a.read(info_a, start, end) != files_b.read(info_b, start, end):
            return False
        files_a.give_back(info_a, start, end)
        files_b.give_back(info_b, start, end)
    return True
