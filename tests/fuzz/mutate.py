"""Mutations that know what they change: JSON by tokens, headers with their length and data, keys by segments.

Bytes changed at random seldom get past a JSON parser. These edits move whole tokens and bring in the words, numbers and
names that parsers treat specially; broken JSON comes out too, but less often. Everything follows from the generator.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from streammerge.core.dtypes import BITS
from streammerge.names.grammar import SLOTS

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\w+|\s+|.', re.DOTALL)
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null')
_END = re.compile(rb'data_offsets"\s*:\s*\[\s*\d{1,5}\s*,\s*(\d{1,5})\s*\]')
_DTYPES = tuple(f'"{name}"'.encode() for name in BITS)
MOST_DATA = 4096
"""Bytes of tensor data behind a header."""

_COMMON = (
    b"{}", b"[]", b"[", b"]", b"{", b"}", b",", b":", b'""', b"null", b"true", b"false", b"NaN", b"-Infinity", b"0",
    b"-0", b"-1", b"1", b"2", b"8", b"64", b"1.0", b"0.0", b"1e0", b"1e400", b"1E+2", b"-0.0", b"9007199254740993",
    b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"18446744073709551616", b"9" * 41,
    b'"\\u0000"', b'"\\ud800"', b'"\\ud83d\\ude00"', b'"\\u001b[2J"', b'"\xe2\x80\xae"', b'"\xff"',
    b'"\xf0\x9f\x98\x80"', b'"\\"', b'"\\u00e9"', b'"e\\u0301"', b" ", b"\n", b"\t", b"\x00", b"\xef\xbb\xbf",
    b"/**/", b"'", b'"a":', b"[[[[",
    b"]]]]", b'{"a":', b'"k":1,',
)  # fmt: skip
WORDS: Mapping[str, tuple[bytes, ...]] = {
    "header": (
        *_COMMON, *_DTYPES, b'"dtype":', b'"shape":', b'"data_offsets":', b'"__metadata__":', b'"F128"', b"[0,0]",
        b'"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},',
        b'"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},',
        b'"__metadata__":{"format":"pt"},', b"[2,0,4]", b"4294967296",
    ),
    "index": (
        *_COMMON, b'"weight_map":', b'"metadata":', b'"total_size":', b'"model.safetensors"', b'"a.bin"', b'".bin"',
        b'"b.bin"', b'"model-00002-of-00002.safetensors"', b'"lm_head.weight"', b'"caf\xc3\xa9.bin"', b'"../a.bin"',
        b'"/a.bin"', b'"a/b.bin"', b'"a\\\\b.bin"', b'"C:a.bin"', b'"nul.bin"', b'"CON.safetensors"',
        b'"a.bin."', b'"a.bin "', b'".."', b'"com1.bin"', b'"com\xc2\xb9.bin"', b'"a.SAFETENSORS"', b'"a\\u0000.bin"',
    ),
    "config": (
        *_COMMON, b'"peft_type":"LORA"', b'"r":', b'"lora_alpha":', b'"rank_pattern":', b'"alpha_pattern":',
        b'"use_dora":', b'"use_rslora":', b'"init_lora_weights":', b'"bias":', b'"target_modules":',
        b'"modules_to_save":', b'"pissa"',
        b'"layer_replication":', b'"trainable_token_indices":', b'"target_parameters":', b'"fan_in_fan_out":',
        b'"peft_version":', b'"0.19.1.dev0@x"', b'"XLORA"', b'"megatron_config":', b'"alora_invocation_tokens":',
        b'"q_proj"', b'"(a*)*b":1', b'"(a|aa)+$":2', b'".*.*.*.*x":1', b'"a{1000}":1', b'"(?=a)":1', b'"[":1',
        b'"^q$":4', b'"(.+)+":1', b'"\\\\bq":1', b'"(?i)Q":1', b'"a|q":2', b'"[a-q]+":3', b'"\\\\d+":5', b'"q*?":1',
        b'"(q)\\\\1":2',
    ),
}  # fmt: skip
"""Tokens, and runs of them, that each JSON document is tried with."""
_FIRST_OF_VALUES = frozenset(b'"-0123456789tfn')
_VALUES = {parser: tuple(filter(_VALUE.fullmatch, words)) for parser, words in WORDS.items()}
"""Those of them that are one value."""
SEGMENTS = (
    *sorted(SLOTS), "weight", "bias", "default", "base_model", "model", "base_layer", "token_adapter",
    "modules_to_save",
    "original_module", "module", "pretrained_model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
    "layers", "0", "1", "7", "self_attn", "q_proj", "qkv_proj", "o_proj", "mlp", "gate_up_proj", "gate_proj", "up_proj",
    "down_proj", "experts", "gate", "w1", "w2", "w3", "block_sparse_moe", "lm_head", "embed_tokens", "norm",
    "language_model", "transformer", "decoder", "text_model", "", "\u202e", "caf\u00e9",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "in_proj_weight", "a b", "0" * 30,
)  # fmt: skip


def mutate_json(data: bytes, rng: Random, parser: str) -> bytes:
    """One value in the place of another, which mostly leaves the JSON whole; or one to four edits of any tokens."""
    tokens, words = _TOKEN.findall(data) or [b"{}"], WORDS[parser]
    if rng.random() < 0.5:
        values = [number for number, token in enumerate(tokens) if token[0] in _FIRST_OF_VALUES]
        for _ in range(rng.choice((1, 1, 2)) if values else 0):
            kind = rng.random()
            at = rng.choice(values)
            tokens[at] = tokens[rng.choice(values)] if kind < 0.3 else rng.choice(_VALUES[parser])
        return b"".join(tokens)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        size = len(tokens)
        at = int(rng.random() * size)
        match int(rng.random() * 8):
            case 0 | 1 | 2 if tokens:
                tokens[at] = rng.choice(words)
            case 3 | 4:
                tokens.insert(at, rng.choice(words))
            case 5:
                del tokens[at : at + int(rng.random() * 8) + 1]
            case 6:
                part = tokens[at : at + int(rng.random() * 24) + 1]
                to = int(rng.random() * size)
                tokens[to:to] = [b",", *part] if rng.random() < 0.3 else part
            case _:
                to = int(rng.random() * size)
                if at < size and to < size:
                    tokens[at], tokens[to] = tokens[to], tokens[at]
    return b"".join(tokens)


def mutate_header(data: bytes, rng: Random, native: Callable[[bytes], bytes]) -> bytes:
    """A whole file: its JSON changed by `native` or by tokens, or its tensors laid out anew; the length put right, and
    mostly as much data behind it as the offsets ask for."""
    length = int.from_bytes(data[:8], "little")
    body, rest = (data[8 : 8 + length], data[8 + length :]) if len(data) > 8 else (b"{}", b"")
    kind = rng.random()
    if kind < 0.55:
        body = mutate_json(body, rng, "header")
    elif kind < 0.7:
        body = _laid_out(body, rng)
    elif kind < 0.95:
        body = native(body)
    else:
        rest = native(rest)
    if rng.random() < 0.75:
        needed = min(MOST_DATA, max((int(end) for end in _END.findall(body)), default=0))
        rest = (rest + bytes(max(0, needed - len(rest))))[:needed]
    return len(body).to_bytes(8, "little") + body + rest


def _laid_out(body: bytes, rng: Random) -> bytes:
    """The tensors of a header, or of a new one, with random dtypes and shapes, one behind the other."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    document: dict[str, Any] = found if isinstance(found, dict) and found else {"a": {}, "b": {}}
    end = 0
    for name, entry in list(document.items())[:20]:
        if name == "__metadata__" or (isinstance(entry, dict) and rng.random() < 0.2):
            continue
        dtype = rng.choice(tuple(BITS))
        shape = [rng.choice((0, 1, 2, 3, 4, 8, 2**31)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 6)))]
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    return json.dumps(document, ensure_ascii=rng.random() < 0.5, separators=(",", ":")).encode("utf-8", "replace")


def mutate_keys(data: bytes, rng: Random) -> bytes:
    """One to four edits of the segments of adapter keys, one key on a line."""
    keys = [key.split(".") for key in data.decode("utf-8", "replace").split("\n")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        key = rng.choice(keys)
        at = int(rng.random() * (len(key) + 1))
        match int(rng.random() * 7):
            case 0 | 1:
                key[at : at + 1] = [rng.choice(SEGMENTS)]
            case 2 | 3:
                key.insert(at, rng.choice(SEGMENTS))
            case 4 if len(key) > 1:
                del key[at : at + 1]
            case 5:
                keys.insert(0, list(key))
            case _:
                rng.shuffle(key) if rng.random() < 0.2 else key.extend(key[at : at + 2])
    return "\n".join(".".join(key[:16]) for key in keys[:4]).encode("utf-8", "replace")


def mutated(parser: str, data: bytes, rng: Random, native: Callable[[bytes], bytes]) -> bytes:
    """A changed case for a parser; `native` changes bytes without knowing what they are."""
    if parser == "header":
        return mutate_header(data, rng, native) if rng.random() < 0.95 else native(data)
    if rng.random() < 0.2:
        return native(data)
    return mutate_keys(data, rng) if parser == "keys" else mutate_json(data, rng, parser)
