"""SHA-256 of whole files, on a thread of its own: what the Hub, signatures and sha256sum go by, at what it costs.

Blocks are made out of order, and this hash only knows one order: a file is read back when it is staged.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

from streammerge.core import io
from streammerge.core.resources import ThreadPool, aligned_buffer
from streammerge.planning.memory import PIECE

SUMS = "SHA256SUMS"
"""The file in an output that `sha256sum -c` takes; it names every file but itself and the two that are written last."""
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def sums_of(hashes: Mapping[str, str]) -> bytes:
    """Hashes by name as sha256sum writes them: a line with a name that it has to escape begins with a backslash."""
    lines = []
    for name, digest in sorted(hashes.items()):
        escaped = "".join(_ESCAPES.get(letter, letter) for letter in name)
        lines.append(f"{chr(92) if escaped != name else ''}{digest}  {escaped}\n")
    return os.fsencode("".join(lines))


class FileHashes:
    """The hashes of files, one file at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPool(1, "sha256")
        self._found: dict[str, Future[str]] = {}
        self._stop = threading.Event()

    def add(self, name: str, path: Path) -> None:
        """Hash the finished file at `path` when its turn comes."""
        self._found[name] = self._pool.submit(self._hash, str(path))

    def results(self) -> dict[str, str]:
        """All hashes in hexadecimal by name; raises InputReadError for a file that could not be read back."""
        found = {name: future.result() for name, future in self._found.items()}
        self.close()
        return found

    def close(self) -> None:
        """Stop at the next piece."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _hash(self, path: str) -> str:
        fd = io.open_input(path)
        try:
            size, digest, buffer = io.state_of(fd, path).size, hashlib.sha256(), aligned_buffer(PIECE)
            for start in range(0, size, PIECE):
                if self._stop.is_set():
                    break
                piece = buffer[: min(PIECE, size - start)]
                io.read_into(fd, path, start, piece)
                digest.update(piece)
            return digest.hexdigest()
        finally:
            io.close(fd)
