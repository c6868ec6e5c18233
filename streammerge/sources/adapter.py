"""A PEFT adapter on disk: its config as plain JSON, its tensors, their values.

safetensors' own reader is the gate: a file it rejects, or reads with other names, shapes or dtypes than our parser, is
refused. Values are then read from a mapping, because that reader has no numpy for BF16 and would load torch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streammerge.core import io, paths, strict_json
from streammerge.core.errors import InputMissingError, InputReadError, MalformedInputError
from streammerge.core.syscalls import stand_in
from streammerge.core.tensors import TensorInfo
from streammerge.core.text import some_of
from streammerge.formats.safetensors import Header, read_header
from streammerge.formats.torch_bin import read_torch_bin
from streammerge.sources.checkpoint import LOCAL
from streammerge.sources.files import TensorFiles
from streammerge.sources.hub import fetch_adapter
from streammerge.sources.locate import parse_adapter

CONFIG, WEIGHTS, TORCH_BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Everything about an adapter but its values. `siblings` are subfolders with adapters that are not merged."""

    root: Path
    identity: str
    config: Mapping[str, Any]
    config_bytes: bytes
    file: str
    tensors: Mapping[str, TensorInfo]
    siblings: tuple[str, ...]
    state: io.FileState
    """Of `file`, as it was before its header was read."""


class Adapter:
    """An opened adapter: `facts`, and its tensors through `files`."""

    def __init__(self, facts: AdapterFacts, mode: str) -> None:
        self.facts = facts
        # A factor is read in small parts: each of them would be a whole page past the page cache.
        self.files = TensorFiles(facts.root, "pread" if mode == "direct" else mode, {facts.file: facts.state})

    def without(self, keys: Collection[str]) -> Adapter:
        """The adapter as if it did not have some of its tensors; both read from the same mappings."""
        other = copy.copy(self)
        left = {name: info for name, info in self.facts.tensors.items() if name not in keys}
        other.facts = replace(self.facts, tensors=left)
        return other

    def values(self, key: str) -> memoryview:
        """All bytes of one tensor, row-major."""
        info = self.facts.tensors[key]
        return self.files.read(info, 0, info.nbytes)


def open_adapter(text: str, mode: str = "auto", *, quiet: bool = True) -> Adapter:
    """The adapter that `text` names: a directory, `DIR:subfolder`, or a Hub id.

    Raises InputMissingError, MalformedInputError, UnsafeInputError, InputReadError or HubError.
    """
    location = parse_adapter(text)
    if location.path is None:
        fetched = fetch_adapter(location, quiet=quiet)
        root, identity = fetched.path, fetched.identity
    else:
        root, identity = Path(location.path), LOCAL
    if location.subfolder:
        if io.exists(root / location.subfolder):
            paths.resolve_inside(root, location.subfolder)
        root = root / location.subfolder
    return Adapter(_facts(root, identity), mode)


def _facts(root: Path, identity: str) -> AdapterFacts:
    folders = io.list_dir(root) if io.is_dir(root) else []
    siblings = tuple(name for name in folders if io.exists(root / name / CONFIG))
    if not io.exists(root / CONFIG):
        raise _no_adapter(root, siblings)
    paths.resolve_inside(root, CONFIG)
    config_bytes = io.read_file(root / CONFIG, strict_json.MAX_BYTES)
    # NaN and Infinity pass here: PEFT reads them, and the check of the config refuses them by field.
    config = strict_json.loads(config_bytes, str(root / CONFIG), nan_ok=True)
    file = next((name for name in (WEIGHTS, TORCH_BIN) if io.exists(root / name)), None)
    if file is None:
        raise InputMissingError(str(root), f"has an `{CONFIG}` and neither `{WEIGHTS}` nor `{TORCH_BIN}`")
    paths.resolve_inside(root, file)
    state = io.path_state(root / file)
    tensors = _read_tensors(root / file, file)
    return AdapterFacts(root, identity, config, config_bytes, file, tensors, siblings, state)


def _read_tensors(path: Path, file: str) -> dict[str, TensorInfo]:
    if file == TORCH_BIN:
        return {info.name: info for info in read_torch_bin(path, file)}
    header = read_header(path, file)
    tensors = {info.name: info for info in header.tensors}
    _agree_with_library(path, header, tensors)
    return tensors


def _agree_with_library(path: Path, header: Header, tensors: Mapping[str, TensorInfo]) -> None:
    from safetensors import SafetensorError, safe_open

    size, theirs = header.data_start + sum(info.nbytes for info in header.tensors), {}
    try:
        with stand_in(str(path), header.raw, size) as opened, safe_open(opened, framework="np") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader is no mapping)
                part = reader.get_slice(name)
                theirs[name] = (part.get_dtype(), tuple(part.get_shape()))
    except SafetensorError as error:
        raise MalformedInputError(str(path), f"the safetensors library refuses it: {error}") from None
    except OSError as error:  # it says `No such file` whatever the system said
        raise InputReadError(str(path), "open", f"the safetensors library says: {error}") from error
    ours = {name: (info.dtype, info.shape) for name, info in tensors.items()}
    if theirs != ours:
        differing = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        raise MalformedInputError(str(path), f"the safetensors library reads {some_of(differing)} differently")


def _no_adapter(root: Path, siblings: tuple[str, ...]) -> InputMissingError:
    if not io.exists(root):
        return InputMissingError(str(root))
    if siblings:
        listed = f"has no adapter at its root; its subfolders with one: {', '.join(siblings)}"
        return InputMissingError(str(root), listed, f"name one of them: `{root}:{siblings[0]}`")
    if io.exists(root / "config.json"):
        return InputMissingError(
            str(root), f"has no `{CONFIG}`: it looks like a checkpoint", "the order is BASE, then ADAPTER"
        )
    return InputMissingError(str(root), f"has no `{CONFIG}`")
