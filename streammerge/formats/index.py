"""The index of a sharded checkpoint: which tensor lies in which shard.

Owns the JSON document and the rule for shard names; opens no shard itself. The one invariant: every file name that
leaves this module is a single plain path component on POSIX and on Windows, so that joining it to the checkpoint's
directory stays in that directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.core import strict_json
from streammerge.core.errors import MalformedInputError, UnsafeInputError
from streammerge.core.tensors import TensorInfo
from streammerge.core.text import SHOWN
from streammerge.formats.safetensors import quoted, tensor_name_problem

SUFFIXES = (".safetensors", ".bin")
"""What a shard's name may end with; one of them per index."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
# Windows opens a device for these whatever the extension; the superscripts count as digits there.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class WeightIndex:
    """`weight_map` from tensor name to shard file name, and whatever `metadata` the index carries."""

    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]


def parse_index(data: bytes, path: str) -> WeightIndex:
    """The index in `data`; a missing `metadata` is an empty one.

    Raises UnsafeInputError for a shard name that could leave the checkpoint, MalformedInputError for everything else.
    """
    document = strict_json.loads(data, path)
    weight_map, metadata = document.get("weight_map"), document.get("metadata", {})
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedInputError(path, "it has no `weight_map` object with at least one tensor")
    if not isinstance(metadata, dict):
        raise MalformedInputError(path, "its `metadata` is not an object")
    files: set[str] = set()
    for name, file in weight_map.items():
        problem = tensor_name_problem(name)
        if problem:
            raise MalformedInputError(path, problem)
        if not isinstance(file, str):
            raise MalformedInputError(path, f"the shard of tensor {quoted(name)} is not a string")
        files.add(file)
    for file in sorted(files):
        problem = file_name_problem(file)
        if problem:
            raise UnsafeInputError(path, f"the shard name {quoted(file)} {problem}")
    _check_suffixes(files, path)
    _check_encodable(metadata, data, path)
    return WeightIndex(weight_map, metadata)


def encode_index(weight_map: Mapping[str, str], total_size: int, base_metadata: Mapping[str, Any]) -> bytes:
    """The index as transformers writes it; `total_size` counts the bytes of all tensors, headers left out, and
    replaces the one in `base_metadata`."""
    return strict_json.dumps({"metadata": {**base_metadata, "total_size": total_size}, "weight_map": dict(weight_map)})


def check_index(index: WeightIndex, headers: Mapping[str, Sequence[TensorInfo]], path: str) -> None:
    """Index and shards name the same tensors in the same files; `headers` maps each shard to its tensors.

    Raises MalformedInputError with the first few disagreements and the count of the others.
    """
    stored = {file: {info.name for info in tensors} for file, tensors in headers.items()}
    found = list(_disagreements(index.weight_map, stored))
    if not found:
        return
    more = f" and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    advice = "index and shards are from different saves, or a download is incomplete; fetch the checkpoint again"
    raise MalformedInputError(path, f"it disagrees with its shards: {'; '.join(found[:SHOWN])}{more}", advice)


def file_name_problem(name: str) -> str | None:
    """Why `name` is not one plain path component everywhere, None where it is."""
    if not name:
        return "is empty"
    if "/" in name or "\\" in name:
        return "is a path, not a file name"
    if name in (".", ".."):
        return "is a directory"
    if ":" in name:
        return "holds a colon: a drive or a stream on Windows"
    if _CONTROL.search(name):
        return "holds a control character"
    if name[-1] in ". ":
        return "ends with a dot or a space, which Windows drops"
    if _DEVICE.fullmatch(name):
        return "is the name of a Windows device"
    return None


def _check_suffixes(files: set[str], path: str) -> None:
    suffixes = set()
    for file in sorted(files):
        suffix = next((suffix for suffix in SUFFIXES if file.endswith(suffix) and file != suffix), None)
        if suffix is None:
            raise MalformedInputError(path, f"the shard {quoted(file)} is neither a `.safetensors` nor a `.bin` file")
        suffixes.add(suffix)
    if len(suffixes) > 1:
        raise MalformedInputError(path, "it names `.safetensors` and `.bin` shards in one index")


def _check_encodable(metadata: Mapping[str, Any], data: bytes, path: str) -> None:
    """Lone surrogates pass Python's JSON reader and fail when the index is written again."""
    if b"\\u" not in data:
        return
    try:
        strict_json.dumps(metadata)
    except UnicodeEncodeError:
        raise MalformedInputError(path, "its `metadata` holds a lone surrogate") from None


def _disagreements(weight_map: Mapping[str, str], stored: Mapping[str, set[str]]) -> Iterator[str]:
    for name, file in weight_map.items():
        if name not in stored.get(file, ()):
            yield f"{quoted(name)} is not in {quoted(file)}"
    for file, names in stored.items():
        for name in sorted(names):
            if name not in weight_map:
                yield f"{quoted(name)} of {quoted(file)} is not in the weight_map"
            elif weight_map[name] != file:
                yield f"{quoted(name)} lies in {quoted(file)} too, the weight_map says {quoted(weight_map[name])}"
