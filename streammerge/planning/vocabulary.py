"""How many ids a tokenizer's files can produce, which the embedding must have rows for.

Counts the highest id, not the entries: ids may have gaps. A sentencepiece model alone is not counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.errors import MalformedInputError

_STRING = rb'"(?:[^"\\]|\\.)*+"'
_PLAIN = rb'[^"\[\]]++'
_MERGES = re.compile(rb'"merges"\s*:\s*(?=\[)')
_ARRAY = re.compile(rb"\[(?:%b|%b|\[(?:%b|%b)*+\])*+\]" % (_PLAIN, _STRING, _PLAIN, _STRING), re.DOTALL)
"""An array of strings or of arrays of strings; possessive, so that no input makes it backtrack."""


def tokenizer_size(files: Mapping[str, str]) -> int | None:
    """The highest id and one, from the tokenizer files `files` (name to path); None where no file says."""
    if "tokenizer.json" in files:
        return _fast_size(files["tokenizer.json"])
    counts: list[int] = []
    if "vocab.json" in files:
        counts.append(_end(_load(files["vocab.json"]).values()))
    if "vocab.txt" in files:
        lines = io.read_file(files["vocab.txt"], strict_json.MAX_BYTES)
        counts.append(lines.count(b"\n") + (not lines.endswith(b"\n") and bool(lines)))
    if "added_tokens.json" in files:
        counts.append(_end(_load(files["added_tokens.json"]).values()))
    return max(counts, default=0) or None


def _fast_size(path: str) -> int | None:
    document = _load(path)
    model, added = document.get("model"), document.get("added_tokens", [])
    vocab = model.get("vocab", {}) if isinstance(model, dict) else {}
    if not isinstance(added, list) or not isinstance(vocab, dict | list):
        raise MalformedInputError(path, "its `model.vocab` or `added_tokens` is not what a tokenizer.json has there")
    ids = [token.get("id") for token in added if isinstance(token, dict)]
    # A Unigram model lists its pieces in the order of their ids.
    return max(len(vocab) if isinstance(vocab, list) else _end(vocab.values()), _end(ids)) or None


def _end(ids: Iterable[Any]) -> int:
    return max((number for number in ids if type(number) is int), default=-1) + 1


def _load(path: str) -> dict[str, Any]:
    """The document, without its merges: they are four fifths of a large tokenizer.json, and of no use here."""
    data = io.read_file(path, strict_json.MAX_BYTES)
    key = _MERGES.search(data)
    array = _ARRAY.match(data, key.end()) if key else None
    if array:
        data = data[: array.start()] + b"[]" + data[array.end() :]
    return strict_json.loads(data, path)
