"""Which files of a repository on the Hub a merge needs, decided from the names of all its files.

Fetches nothing. A base is its weights in one format and the sidecars that an output would get; an adapter is its
config, its weights and its tokenizer. The one invariant: what is named here is in the repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from posixpath import dirname

from streammerge.core import io, strict_json
from streammerge.core.errors import InputMissingError, MalformedInputError
from streammerge.core.text import some_of
from streammerge.formats.filenames import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    MODULES,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    TORCH_BIN,
    TORCH_BIN_INDEX,
    is_tokenizer_file,
    left_out_rule,
    module_folders,
    module_weights,
)
from streammerge.formats.index import parse_index

HEADS = (CONFIG, SAFETENSORS_INDEX, TORCH_BIN_INDEX, MODULES)
"""Small files that say which other files belong to a base."""


def base_files(repo: str, names: Sequence[str], root: Path | None) -> list[str]:
    """The files of a base among `names`; `root` holds those of `HEADS` that there are."""
    modules: frozenset[str] = frozenset()
    if root is not None and MODULES in names:
        modules = module_folders(io.read_file(root / MODULES, strict_json.MAX_BYTES), f"{repo}/{MODULES}")
    sidecars = {name for name in names if left_out_rule(name) is None} | module_weights(names, modules)
    return sorted(sidecars.union(_weight_files(repo, names, root)))


def _weight_files(repo: str, names: Sequence[str], root: Path | None) -> list[str]:
    """The index and the shards it names, or the one file; safetensors before torch files."""
    for single, listing in ((SAFETENSORS, SAFETENSORS_INDEX), (TORCH_BIN, TORCH_BIN_INDEX)):
        if listing in names and root is not None:
            where = f"{repo}/{listing}"
            shards = set(parse_index(io.read_file(root / listing, strict_json.MAX_BYTES), where).weight_map.values())
            missing = sorted(shards.difference(names))
            if missing:
                raise MalformedInputError(where, f"it names {some_of(missing)}, which the repository does not hold")
            if single in names and single not in shards:
                raise MalformedInputError(
                    where, f"it stands beside a `{single}` that it does not name: two checkpoints in one repository"
                )
            return [listing, *shards]
        if single in names:
            return [single]
    lone = [
        name for name in names if "/" not in name and name.endswith(".safetensors") and not name.startswith("adapter_")
    ]
    if len(lone) == 1:
        return lone
    is_adapter = ADAPTER_CONFIG in names
    raise InputMissingError(
        repo,
        "is an adapter, not a base"
        if is_adapter
        else f"holds no weights: no `{SAFETENSORS}`, no `{TORCH_BIN}`, no index of either",
        "the base comes first: `streammerge run BASE ADAPTER -o OUT`" if is_adapter else "",
    )


def adapter_files(repo: str, names: Sequence[str], folder: str) -> list[str]:
    """The files of the adapter in `folder` (empty, or with a `/` at the end)."""
    inside = {name.removeprefix(folder) for name in names if name.startswith(folder)}
    others = sorted(
        name for name in names if name.endswith(f"/{ADAPTER_CONFIG}") and dirname(dirname(name)) == dirname(folder)
    )
    if ADAPTER_CONFIG not in inside:
        raise _no_adapter(repo, folder, [dirname(name) for name in names if name.endswith(f"/{ADAPTER_CONFIG}")])
    weights = next((name for name in ADAPTER_WEIGHTS if name in inside), None)
    if weights is None:
        expected = " nor ".join(f"`{name}`" for name in ADAPTER_WEIGHTS)
        raise InputMissingError(f"{repo}/{folder}".rstrip("/"), f"has an `{ADAPTER_CONFIG}` and neither {expected}")
    tokenizer = sorted(name for name in inside if is_tokenizer_file(name))
    return [*(folder + name for name in (ADAPTER_CONFIG, weights, *tokenizer)), *others]


def _no_adapter(repo: str, folder: str, subfolders: list[str]) -> InputMissingError:
    where = f"no adapter in `{folder}`" if folder else "no adapter at its root"
    if subfolders:
        return InputMissingError(
            repo,
            f"has {where}; its subfolders with one: {some_of(sorted(subfolders))}",
            f"name one of them: `{repo}:{min(subfolders)}`",
        )
    return InputMissingError(repo, f"has {where}: no `{ADAPTER_CONFIG}`", "the order is BASE, then ADAPTER")
