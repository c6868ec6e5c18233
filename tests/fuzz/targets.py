"""The four parsers of what strangers write, each as one function of bytes that holds a parser to its promises.

A case either passes or is refused by an error that has an exit code; whatever else comes out is a fault, and so is a
header that the safetensors library rejects or reads differently. Nothing here needs a fuzzer: the kept corpus is
replayed by plain tests, and a campaign drives the same functions millions of times.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import safetensors

from streammerge.core import strict_json
from streammerge.core.dtypes import BITS
from streammerge.core.errors import AdapterError, InputError, StreamMergeError
from streammerge.core.tensors import TensorInfo
from streammerge.core.text import printable
from streammerge.formats.index import check_index, encode_index, parse_index
from streammerge.formats.safetensors import LENGTH_BYTES, Header, encode_header, parse_header, tensor_name_problem
from streammerge.methods.lora_config import LoraConfig, parse_config
from streammerge.methods.parts import sort_parts
from streammerge.methods.readers import refuse_type
from streammerge.names.architectures import architecture_of
from streammerge.names.catalog import Catalog
from streammerge.names.grammar import AdapterKey, KeyKind, parse_key
from streammerge.names.resolve import Found, Missing, Resolver, Wanted

LONGEST_MESSAGE = 20_000
"""Characters of an error as it is shown, whatever the file holds."""
MODULES = ("model.layers.0.self_attn.q_proj", "lm_head", "a" * 60)
SHORT_MODULES = ("", "q", "a.q", "aab.a_9")
"""What a regular expression that backtracks without end still matches at once."""
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
MOST_KEYS = 4
NAMED = frozenset({"lora_A", "lora_B", "lora_embedding_A", "ia3_l", "hada_w1_a", "lokr_t2", "vera_lambda_d", "oft_r"})
"""Some slots that an adapter's name may follow; others keep all that follows."""


def refused(error: StreamMergeError, kinds: tuple[type[StreamMergeError], ...], *, thorough: bool) -> None:
    """Hold a refusal to what every refusal is: of a documented kind, and shown in bounds and without control."""
    assert isinstance(error, kinds), f"{type(error).__name__} is not an error of this parser"
    if thorough:
        text = str(error)
        assert len(text) <= LONGEST_MESSAGE, f"a message of {len(text):,} characters"
        assert printable(text.replace("\n", "")) == text.replace("\n", ""), "a message that is not escaped"


# --- the header of a safetensors file ---------------------------------------------------------------------------------
def fuzz_header(data: bytes, *, thorough: bool = True) -> bool:
    """`data` is a whole safetensors file. Whether it was accepted."""
    raw = data[: LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")]
    try:
        header = parse_header(raw, len(data), "file", "file")
    except StreamMergeError as error:
        refused(error, (InputError,), thorough=thorough)
        return False
    theirs = {name: (item["dtype"], item["shape"], item["data"]) for name, item in safetensors.deserialize(data)}
    ours = {
        info.name: (info.dtype, list(info.shape), data[info.start : info.start + info.nbytes])
        for info in header.tensors
    }
    assert ours == theirs, "the safetensors library reads other tensors"
    if thorough:
        _check_written(header, len(data) - header.data_start)
    return True


def _check_written(header: Header, size: int) -> None:
    """The header of the same tensors, written by us, is read as the same."""
    entries = [(info.name, info.dtype, info.shape, info.nbytes) for info in header.tensors]
    again = encode_header(entries, header.metadata)
    copy = parse_header(again, len(again) + size, "file", "file")
    assert [(info.name, info.dtype, info.shape, info.nbytes) for info in copy.tensors] == entries
    assert copy.metadata == header.metadata


# --- the index --------------------------------------------------------------------------------------------------------
def fuzz_index(data: bytes, *, thorough: bool = True) -> bool:
    """`data` is an index. Whether it was accepted."""
    try:
        index = parse_index(data, "file")
    except StreamMergeError as error:
        refused(error, (InputError,), thorough=thorough)
        return False
    for file in set(index.weight_map.values()):
        assert PurePosixPath(file).name == PureWindowsPath(file).name == file, f"{file!r} is no plain file name"
        assert file.isprintable() or all(ord(char) > 0x9F for char in file if not char.isprintable())
    again = parse_index(encode_index(index.weight_map, 7, index.metadata), "file")
    assert again.weight_map == index.weight_map
    assert {**again.metadata, "total_size": 0} == {**index.metadata, "total_size": 0}
    if thorough:
        _check_against_shards(index.weight_map, data)
    return True


def _check_against_shards(weight_map: Mapping[str, str], data: bytes) -> None:
    headers: dict[str, list[TensorInfo]] = {}
    for name, file in weight_map.items():
        headers.setdefault(file, []).append(TensorInfo(name, "U8", (1,), file, 8, 1))
    index = parse_index(data, "file")
    check_index(index, headers, "file")
    first = next(iter(headers))
    headers[first] = headers[first][1:]
    try:
        check_index(index, headers, "file")
    except InputError as error:
        refused(error, (InputError,), thorough=True)
    else:
        raise AssertionError("a tensor that no shard holds is not missed")


# --- the adapter's config ---------------------------------------------------------------------------------------------
def fuzz_config(data: bytes, *, thorough: bool = True) -> bool:
    """`data` is an adapter_config.json. Whether it was accepted, unknown fields aside."""
    try:
        raw = strict_json.loads(data, "file", nan_ok=True)
    except StreamMergeError as error:
        refused(error, (InputError,), thorough=thorough)
        return False
    try:
        refuse_type(raw)
    except StreamMergeError as error:
        refused(error, (AdapterError,), thorough=thorough)
    accepted = False
    for ignored in ((), tuple(raw)):
        try:
            config = parse_config(raw, ignored)
        except StreamMergeError as error:
            refused(error, (AdapterError,), thorough=thorough)
        else:
            _check_config(config, thorough=thorough)
            if thorough:
                _check_patterns(config)
            accepted = True
    return accepted


def _check_config(config: LoraConfig, *, thorough: bool) -> None:
    assert config.rank is None or (type(config.rank) is int and config.rank >= 1)
    assert math.isfinite(config.alpha)
    for module in MODULES:
        try:
            rank, scaling = config.rank_of(module), config.scaling(module, 8)
        except StreamMergeError as error:
            refused(error, (AdapterError,), thorough=thorough)
            continue
        assert rank is None or (type(rank) is int and rank >= 1)
        assert math.isfinite(scaling)


def _check_patterns(config: LoraConfig) -> None:
    """Short patterns decide as they do for PEFT, which tries them as regular expressions."""
    for patterns in (config.rank_pattern, config.alpha_pattern):
        if len(patterns) > 4 or any(len(key) > 12 for key in patterns):
            continue
        for module in SHORT_MODULES:
            with warnings.catch_warnings(action="ignore"):
                matching = (key for key in patterns if re.match(rf"(.*\.)?({key})$", module))
                wanted = next((patterns[key] for key in matching), None)
            try:
                found = patterns.value_for(module, None)
            except StreamMergeError as error:
                refused(error, (AdapterError,), thorough=True)
            else:
                assert found == wanted, f"{module}: {dict(patterns)}"


# --- adapter keys -----------------------------------------------------------------------------------------------------
def fuzz_keys(data: bytes, *, thorough: bool = True) -> bool:
    """`data` is a list of adapter keys, one on a line. Whether they are sorted into parts."""
    keys = list(dict.fromkeys(data.decode("utf-8", "replace").split("\n")))[:MOST_KEYS]
    for key in keys if thorough else ():
        _check_key(parse_key(key))
    tensors = {
        key: TensorInfo(key, "F32", (4 << number % 3, 8 >> number % 2), "file", 8, BITS["F32"])
        for number, key in enumerate(keys)
        if tensor_name_problem(key) is None
    }
    try:
        parts = sort_parts(tensors, lambda one, other: one.name < other.name)
    except StreamMergeError as error:
        refused(error, (AdapterError,), thorough=thorough)
        return False
    modules = {module.module: None for module in parts.modules}
    placed = [info.name for module in parts.modules for info in module.slots.values()]
    placed += [item.key.key for item in (*parts.replacements, *parts.tokens)]
    assert sorted([*placed, *parts.ignored]) == sorted(tensors), "a tensor is lost, or used twice"
    if thorough:
        _check_resolved(list(modules), [item.name for item in parts.replacements], len(data) % 3)
    return True


def _check_key(key: AdapterKey) -> None:
    """`module` and `slot` do not depend on wrappers, prefix or adapter name."""
    segments = key.key.split(".")
    middle = len(segments) // 2
    wrapped = parse_key(".".join((*segments[:middle], "_fsdp_wrapped_module", *segments[middle:], "_orig_mod")))
    plain = parse_key(key.key)
    assert plain == key
    if not WRAPPERS.issuperset(segments):
        assert (wrapped.module, wrapped.slot, wrapped.kind) == (key.module, key.slot, key.kind)
    if key.kind is KeyKind.FACTOR and key.module and not key.depth and key.inside is None and "." not in key.slot:
        for name in (".weight", ".default.weight", "") if key.slot in NAMED else (".weight", ""):
            again = parse_key(f"base_model.model.{key.module}.{key.slot}{name}")
            assert (again.module, again.slot, again.kind) == (key.module, key.slot, key.kind), name


def _check_resolved(modules: Sequence[str], full: Sequence[str], number: int) -> None:
    """Every wish is answered, and what is found lies inside what is stored."""
    resolver = _resolvers()[number]
    shape = (16, 16)
    wishes = [Wanted(module, ("weight",), lambda found: found.shape == shape, shape) for module in modules]
    for answer in resolver.resolve(wishes):
        assert isinstance(answer, Found | Missing)
        if isinstance(answer, Found):
            for piece in answer.target.pieces:
                assert piece.tensor in resolver.catalog.stored or answer.alias, piece
    for name in full:
        resolver.find(name)


@functools.cache
def _resolvers() -> tuple[Resolver, ...]:
    """A Llama, a Phi-3 whose projections are fused, a Mixtral whose experts are stored one by one."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    attention = {f"self_attn.{letter}_proj": (16, 16) for letter in "qkvo"}
    mlp = {"mlp.gate_proj": (32, 16), "mlp.up_proj": (32, 16), "mlp.down_proj": (16, 32)}
    experts = {
        f"block_sparse_moe.experts.{n}.w{w}": (16, 32) if w == 2 else (32, 16) for n in range(2) for w in (1, 2, 3)
    }
    fused = {"self_attn.qkv_proj": (48, 16), "self_attn.o_proj": (16, 16), "mlp.gate_up_proj": (64, 16)}
    rows = (
        ("llama", "LlamaForCausalLM", {**attention, **mlp}),
        ("phi3", "Phi3ForCausalLM", {**fused, "mlp.down_proj": (16, 32)}),
        ("mixtral", "MixtralForCausalLM", {**attention, **experts, "block_sparse_moe.gate": (2, 16)}),
    )
    found = []
    for model_type, name, shapes in rows:
        config = {"model_type": model_type, "architectures": [name], "num_hidden_layers": 2, **sizes}
        named = {"model.embed_tokens": (24, 16), "model.norm": (16,)}
        named |= {f"model.layers.{layer}.{module}": shape for layer in range(2) for module, shape in shapes.items()}
        stored = {f"{module}.weight": _stored(f"{module}.weight", shape) for module, shape in named.items()}
        if model_type != "llama":
            stored["lm_head.weight"] = _stored("lm_head.weight", (24, 16))
        found.append(Resolver(Catalog(stored, architecture_of(config), config)))
    return tuple(found)


def _stored(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, "F32", shape, "file", 8, 4 * math.prod(shape))


TARGETS: Mapping[str, Callable[..., Any]] = {
    "header": fuzz_header,
    "index": fuzz_index,
    "config": fuzz_config,
    "keys": fuzz_keys,
}
"""The parsers by name, each taking bytes."""
