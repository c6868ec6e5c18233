"""Bytes of tensors out of open weight files: by mapping, by positional reads where mapping is unsafe, or past the page
cache.

A file's size and modification time are checked again at every read, so that one which shrinks or changes under us is
an error message. At most a handful of files are open at a time; a reader holds what it was handed as long as it needs.
"""

from __future__ import annotations

import math
import mmap
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from streammerge.core import io, pages, paths
from streammerge.core.dtypes import itemsize
from streammerge.core.errors import InputReadError
from streammerge.core.resources import aligned_buffer
from streammerge.core.tensors import TensorInfo

OPEN_FILES = 4
COMPARED = 4 * 2**20
"""Bytes of two tensors that are compared at a time."""


class Scratch:
    """Memory of one thread into which files are read where they are not mapped; it grows to what is asked for."""

    def __init__(self) -> None:
        self._buffer = memoryview(b"")

    def take(self, size: int) -> memoryview:
        """At least `size` bytes, aligned for direct reads; the same ones every time."""
        if len(self._buffer) < size:
            self._buffer = aligned_buffer(size)
        return self._buffer


class OpenFile:
    """One open weight file; closed when the last view of it is gone."""

    def __init__(self, path: Path, *, mapped: bool, direct: bool) -> None:
        self.path = str(path)
        self.fd = io.open_input(path)
        self.direct: int | None = None
        self.state = io.state_of(self.fd, self.path)
        self.mapping: mmap.mmap | None = (
            io.map_input(self.fd, self.path, self.state.size) if mapped and self.state.size else None
        )
        if direct:
            self.direct = io.open_direct(self.path)
            if self.direct is None:
                raise InputReadError(self.path, "read past the page cache", "its file system does not offer that")

    def check(self, before: io.FileState | None = None) -> None:
        """Raise InputReadError if the file is no longer what was opened, or what was opened `before`."""
        now, then = io.state_of(self.fd, self.path), before or self.state
        if now != then:
            sizes = f"it had {then.size:,} bytes and has {now.size:,} now"
            reason = sizes if now.size != then.size else "it was modified"
            raise InputReadError(self.path, "read", f"the file changed while it was being used: {reason}")

    def __del__(self) -> None:
        for fd in (getattr(self, "fd", None), getattr(self, "direct", None)):
            if fd is not None:
                io.close(fd)

    def read(self, start: int, end: int, scratch: Scratch) -> memoryview:
        """Bytes [start, end): a view of the mapping, or of what was read into `scratch`."""
        if self.mapping is not None:
            return memoryview(self.mapping)[start:end]
        if self.direct is None:
            target = scratch.take(end - start)[: end - start]
            io.read_into(self.fd, self.path, start, target)
            return target
        first = start // io.ALIGNMENT * io.ALIGNMENT
        last = -(-end // io.ALIGNMENT) * io.ALIGNMENT
        buffer = scratch.take(last - first)[: last - first]
        io.read_direct(self.direct, self.path, first, buffer, end - first)
        return buffer[start - first : end - first]


class TensorFiles:
    """Reads tensors of the weight files below one directory. `mode` is `mmap`, `pread`, `direct`, or `auto`: `pread` on
    network file systems and where an address-space limit leaves no room, else `mmap`. `states` are those that files
    must still be in when they are opened. `used` counts the bytes that were handed out."""

    def __init__(self, root: Path, mode: str, states: Mapping[str, io.FileState] | None = None) -> None:
        self.root = root
        self.mapped = mode == "mmap" or (mode == "auto" and not paths.is_on_network(root))
        self.direct = mode == "direct"
        self.used = 0
        self._auto = mode == "auto"
        self._open: OrderedDict[str, OpenFile] = OrderedDict()
        self._first: dict[str, io.FileState] = dict(states or {})
        self._lock = threading.Lock()

    def read(self, info: TensorInfo, start: int, end: int, scratch: Scratch | None = None) -> memoryview:
        """Bytes [start, end) of the tensor in row-major order; a view of the mapping where that is possible, or of
        `scratch`, good until that is used again."""
        if info.strides is not None:
            return self._gather(info, start, end)
        return self._checked(info, start, end).read(info.start + start, info.start + end, scratch or Scratch())

    def copy(self, info: TensorInfo, start: int, end: int, into: memoryview, scratch: Scratch) -> None:
        """The same bytes into `into`, in one copy where files are not read past the page cache. Python's lock is not
        held while the disk is waited for."""
        if info.strides is not None or self.direct:
            into[:] = self.read(info, start, end, scratch)
            return
        file = self._checked(info, start, end)
        io.read_into(file.fd, file.path, info.start + start, into)

    def opened(self, name: str) -> OpenFile:
        """A file, open as long as somebody holds it."""
        return self._file(name)

    def give_back(self, info: TensorInfo, start: int, end: int) -> None:
        """Let the pages of these bytes go, where they are contiguous; whoever still reads them faults them in again."""
        if info.strides is None:
            file = self._file(info.file)
            if file.mapping is not None:
                pages.give_back(file.mapping, info.start + start, info.start + end)

    def raw(self, name: str, start: int, end: int) -> bytearray:
        """Bytes [start, end) of a file, never mapped: a touch of a mapping may map a huge page, 2 MiB for a sample."""
        file = self._file(name)
        file.check()
        return io.read_at(file.fd, file.path, start, end - start)

    def size(self, name: str) -> int:
        """Bytes of a file, as when it was opened."""
        return self._file(name).state.size

    def _checked(self, info: TensorInfo, start: int, end: int) -> OpenFile:
        """The file of a tensor, unchanged, and with bytes [start, end) of the tensor in it."""
        file = self._file(info.file, end - start)
        file.check()
        if info.start + end > file.state.size:
            reason = f"{info.start + end:,} bytes were expected, the file has {file.state.size:,}"
            raise InputReadError(file.path, "read", reason)
        return file

    def _file(self, name: str, using: int = 0) -> OpenFile:
        with self._lock:
            self.used += using
            file = self._open.get(name)
            if file is None:
                file = self._opened(self.root / name)
                file.check(self._first.setdefault(name, file.state))
                self._open[name] = file
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)
            self._open.move_to_end(name)
            return file

    def _opened(self, path: Path) -> OpenFile:
        # A link may lead from a local directory to a file that is not.
        mapped = self.mapped and not (self._auto and paths.is_on_network(path))
        try:
            return OpenFile(path, mapped=mapped, direct=self.direct)
        except InputReadError as error:
            if not (self._auto and self.mapped and error.operation == "map"):
                raise
            self.mapped = False
            return OpenFile(path, mapped=False, direct=False)

    def _gather(self, info: TensorInfo, start: int, end: int) -> memoryview:
        """Row-major bytes of a strided tensor: whole rows of its first axis are gathered, then cut."""
        import numpy as np

        width = itemsize(info.dtype)
        strides = info.strides or ()
        row = math.prod(info.shape[1:]) * width
        first, last = start // row, -(-end // row)
        reach = sum((n - 1) * step for n, step in zip(info.shape[1:], strides[1:], strict=True))
        low, high = first * strides[0], (last - 1) * strides[0] + reach + 1
        data = self._checked(info, low * width, high * width).read(
            info.start + low * width, info.start + high * width, Scratch()
        )
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
