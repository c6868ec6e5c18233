"""`streammerge run --no-verify` without what makes it durable and checked: no sync, no digests of blocks.

    python bench/unprotected.py BASE ADAPTER -o OUT

For `durability.py` alone: what it writes is right until the power fails, and nobody could tell.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

from streammerge import stream
from streammerge.cli.main import main
from streammerge.core import io


class NoDigest:
    """Takes bytes and looks at none of them."""

    def update(self, data: memoryview) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        """The digest of nothing, whatever came."""
        return "0" * 32


def no_sync(*_: object) -> None:
    """Instead of a sync: nothing."""


if __name__ == "__main__":
    io.sync_file = io.sync_dir = no_sync
    stream.xxhash = SimpleNamespace(xxh3_128=NoDigest)  # type: ignore[assignment]
    code = main(["run", *sys.argv[1:], "--no-verify"])
    sys.stdout.flush()
    os._exit(code)  # as the command does: the interpreter's end is no part of it
