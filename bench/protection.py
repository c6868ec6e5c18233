"""`streammerge run --no-verify` without what makes it durable, or with a clock on it.

    python bench/protection.py without BASE ADAPTER -o OUT
    python bench/protection.py timed BASE ADAPTER -o OUT

`without` syncs nothing and digests nothing: what it writes is right until the power fails, and nobody could tell.
`timed` does both and prints a JSON object: the seconds that all threads together spent on them. For `durability.py`
alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import xxhash

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


def leave_out() -> None:
    """Neither syncs nor digests."""
    io.sync_file = io.sync_dir = no_sync
    stream.xxhash = SimpleNamespace(xxh3_128=NoDigest)  # type: ignore[assignment]


def put_clocks_on() -> dict[str, list[float]]:
    """Both as they are; the seconds of every call are added to what is returned, from any thread."""
    spent: dict[str, list[float]] = {"sync": [], "digest": []}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent[name].append(time.perf_counter() - began)

        return measured

    class Digest:
        def __init__(self) -> None:
            real = xxhash.xxh3_128()
            self.update, self.hexdigest = timed("digest", real.update), real.hexdigest

    io.sync_file, io.sync_dir = timed("sync", io.sync_file), timed("sync", io.sync_dir)
    stream.xxhash = SimpleNamespace(xxh3_128=Digest)  # type: ignore[assignment]
    return spent


if __name__ == "__main__":
    way, *words = sys.argv[1:]
    spent = put_clocks_on() if way == "timed" else leave_out()
    code = main(["run", *words, "--no-verify", "--quiet"])
    if spent:
        print(json.dumps({name: sum(seconds) for name, seconds in spent.items()}))
    sys.stdout.flush()
    os._exit(code)  # as the command does: the interpreter's end is no part of it
