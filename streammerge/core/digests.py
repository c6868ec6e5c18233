"""Digests of files: xxh3-128 of each block, and of the blocks' digests for the whole file; and of JSON documents that
carry their own.

Blocks are fixed ranges of a file, so that they can be hashed by whoever writes them, in any order, and checked one by
one. Not against attackers: `--sha256` is for those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from streammerge.core import strict_json

BLOCK = 64 * 2**20
"""Bytes of a block: large enough that a 140 GB output has about two thousand, small enough to be one unit of work."""


def block_count(size: int) -> int:
    """Blocks of a file of `size` bytes; an empty file has none."""
    return -(-size // BLOCK)


def block_range(number: int, size: int) -> tuple[int, int]:
    """First and last byte (half-open) of a block."""
    return number * BLOCK, min((number + 1) * BLOCK, size)


def block_number(offset: int) -> int:
    """The block that holds a byte of a file."""
    return offset // BLOCK


def block_digest(pieces: Iterable[bytes | bytearray | memoryview]) -> str:
    """The digest of one block, given in pieces."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def file_digest(blocks: Sequence[str]) -> str:
    """The digest of a file from those of its blocks."""
    return xxhash.xxh3_128("".join(blocks).encode()).hexdigest()


def own_digest(document: Mapping[str, Any]) -> str:
    """The digest of a document without the digest in it."""
    rest = {name: value for name, value in document.items() if name != "digest"}
    return xxhash.xxh3_128(strict_json.dumps(rest)).hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document with its own digest in it."""
    return {**document, "digest": own_digest(document)}


def is_sealed(document: Mapping[str, Any], data: bytes) -> bool:
    """Whether a sealed document is what was written, to the byte: values that are written in another way (`1E-05`,
    `\\u0041`) would have the same digest."""
    return document.get("digest") == own_digest(document) and data == strict_json.dumps(document)
