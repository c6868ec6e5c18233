"""A base checkpoint on disk: which files hold its weights, every header, its config; and reads of its tensors.

Headers of all shards are read and checked against the index before anything else happens. The index decides which
files belong to the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.core import io, paths, strict_json
from streammerge.core.errors import InputMissingError, MalformedInputError
from streammerge.core.tensors import TensorInfo
from streammerge.formats.index import WeightIndex, check_index, parse_index
from streammerge.formats.safetensors import Header, read_header
from streammerge.formats.torch_bin import read_torch_bin
from streammerge.sources.files import TensorFiles
from streammerge.sources.hub import fetch_base
from streammerge.sources.locate import parse_base

LOCAL = "local"
"""The identity of inputs that are no commit on the Hub; their paths stay out of reports."""
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_BIN, TORCH_BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file: its tensors in the order of their bytes, and its header if it is a safetensors file."""

    file: str
    size: int
    tensors: tuple[TensorInfo, ...]
    header: Header | None
    state: io.FileState
    """As it was before its header was read."""


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """Everything about a checkpoint that is known without reading a weight."""

    root: Path
    origin: Path
    """What the user named: the directory, or a file in it."""
    identity: str
    shards: tuple[Shard, ...]
    index: WeightIndex | None
    config: Mapping[str, Any] | None
    config_bytes: bytes
    lone: bool
    """A single file without a config beside it: no sidecars, the file keeps its name."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All tensors by name, in the order of shards and bytes."""
        return {info.name: info for shard in self.shards for info in shard.tensors}

    @property
    def is_torch_bin(self) -> bool:
        """Whether the weights are torch pickles."""
        return any(shard.header is None for shard in self.shards)


class Checkpoint:
    """An opened base: `facts`, and its tensors through `files`."""

    def __init__(self, facts: CheckpointFacts, mode: str) -> None:
        self.facts = facts
        self.files = TensorFiles(facts.root, mode, {shard.file: shard.state for shard in facts.shards})


def open_checkpoint(text: str, mode: str = "auto", *, quiet: bool = True) -> Checkpoint:
    """The base that `text` names: a directory, one `.safetensors` file, or a Hub id.

    Raises InputMissingError, MalformedInputError, InputReadError or HubError.
    """
    location = parse_base(text)
    if location.path is None:
        fetched = fetch_base(location, quiet=quiet)
        return Checkpoint(read_facts(fetched.path, fetched.identity), mode)
    path = Path(location.path)
    return Checkpoint(read_facts(path, LOCAL), mode)


def read_facts(path: Path, identity: str) -> CheckpointFacts:
    """The facts of a local directory or file."""
    if io.is_dir(path):
        index, files = _weight_files(path)
        return _facts(path, identity, index, files, lone=False)
    if path.suffix != ".safetensors":
        raise InputMissingError(str(path), "is neither a directory nor a `.safetensors` file")
    root = path.parent
    if not io.exists(root / "config.json"):
        return _facts(root, identity, None, [path.name], lone=True)
    index, files = _weight_files(root)
    if files != [path.name]:
        raise InputMissingError(str(path), "is only part of the checkpoint beside it", f"give the directory `{root}`")
    return _facts(root, identity, index, files, lone=False)


def _facts(root: Path, identity: str, index: WeightIndex | None, files: list[str], *, lone: bool) -> CheckpointFacts:
    shards = tuple(_read_shard(root, file) for file in files)
    if index is not None:
        name = SAFETENSORS_INDEX if files[0].endswith(".safetensors") else TORCH_BIN_INDEX
        check_index(index, {shard.file: shard.tensors for shard in shards}, str(root / name))
    config_bytes = b""
    if not lone and io.exists(root / "config.json"):
        paths.resolve_inside(root, "config.json")
        config_bytes = io.read_file(root / "config.json", strict_json.MAX_BYTES)
    config = strict_json.loads(config_bytes, str(root / "config.json")) if config_bytes else None
    return CheckpointFacts(root, root / files[0] if lone else root, identity, shards, index, config, config_bytes, lone)


def _read_shard(root: Path, file: str) -> Shard:
    path = root / file
    if not io.exists(path):
        raise InputMissingError(
            str(path),
            "is named by the index and is not there",
            "fetch the missing shard, or the whole checkpoint again",
        )
    paths.resolve_inside(root, file)
    state = io.path_state(path)
    if file.endswith(".safetensors"):
        header = read_header(path, file)
        end = max((info.start + info.nbytes for info in header.tensors), default=header.data_start)
        return Shard(file, end, header.tensors, header, state)
    return Shard(file, state.size, read_torch_bin(path, file), None, state)


def _weight_files(root: Path) -> tuple[WeightIndex | None, list[str]]:
    """The index, if there is one, and the weight files of a directory."""
    for single, listing in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH_BIN, TORCH_BIN_INDEX)):
        has_single, has_index = io.exists(root / single), io.exists(root / listing)
        if has_index:
            paths.resolve_inside(root, listing)
            index = parse_index(io.read_file(root / listing, strict_json.MAX_BYTES), str(root / listing))
            files = list(dict.fromkeys(sorted(index.weight_map.values())))
            if has_single and files != [single]:
                raise MalformedInputError(
                    str(root / listing),
                    f"it stands beside a `{single}` that it does not name: two checkpoints in one directory",
                    "remove the one that is out of date",
                )
            return index, files
        if has_single:
            return None, [single]
    lone = [name for name in io.list_dir(root) if name.endswith(".safetensors")] if io.is_dir(root) else []
    if len(lone) == 1 and not lone[0].startswith("adapter_"):
        return None, lone
    raise InputMissingError(
        str(root),
        "holds no weights: no `model.safetensors`, no `pytorch_model.bin`, no index of either",
        "is this an adapter? The base comes first: `streammerge run BASE ADAPTER -o OUT`"
        if io.exists(root / "adapter_config.json")
        else "",
    )
