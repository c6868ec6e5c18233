"""Which files besides the weights an output gets, where they come from, and which are left out by what rule.

Everything in the base that is no weight is copied, unless the deny-list of formats.filenames names it. An adapter's
tokenizer and chat template replace the base's all together or not at all. The one invariant: every file below the base
is a weight, the config, the index, a sidecar, or left out by a named rule.
"""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from streammerge.core import io, paths, strict_json
from streammerge.core.errors import BaseMismatchError, CompositionError, UnsafeInputError
from streammerge.core.text import SHOWN, some_of
from streammerge.formats.filenames import (
    CONFIG,
    MODULES,
    SAFETENSORS_INDEX,
    TORCH_BIN_INDEX,
    has_vocabulary,
    is_tokenizer_file,
    left_out,
    module_folders,
    module_weights,
)
from streammerge.planning.vocabulary import tokenizer_size

BASE = "base"
CODE = ".py"
"""What a loader that trusts the checkpoint's code would import."""
NO_CODE = "Python code, left out by `--no-code`"


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file to copy: `name` in the output (relative, with `/`), the real `path` it is read from, and whose it is:
    `base`, or the adapter's number as `adapter:0`."""

    name: str
    path: str
    origin: str


@dataclass(frozen=True, slots=True)
class SidecarPlan:
    """All sidecars by name; what was left out (a file, or a folder with `/` at the end) and the rule; and which of
    the sidecars are Python code, for the report to name."""

    files: tuple[Sidecar, ...]
    left_out: tuple[tuple[str, str], ...]
    code: tuple[str, ...]


def plan_sidecars(
    base_root: str | None,
    weight_files: Collection[str],
    adapters: Sequence[str],
    vocab_rows: int | None,
    *,
    no_code: bool = False,
) -> SidecarPlan:
    """The sidecars of an output: `base_root` is None for a base that is a lone file, which has none; `adapters` are
    directories; `vocab_rows` counts the rows of the output's embedding; `no_code` leaves Python files out.

    Raises UnsafeInputError for a link that leads outside or a file that is not regular, CompositionError for adapters
    with different tokenizers, BaseMismatchError for a tokenizer that is larger than the embedding.
    """
    if base_root is None:
        return SidecarPlan((), (), ())
    tokenizer, partial = _adapters_tokenizer(adapters)
    _check_size(tokenizer, vocab_rows)
    files, dropped = _base_files(base_root, weight_files, replaced=bool(tokenizer))
    files += tokenizer
    code = tuple(sorted(file.name for file in files if file.name.casefold().endswith(CODE)))
    if no_code:
        files = [file for file in files if file.name not in code]
        dropped += [(name, NO_CODE) for name in code]
        code = ()
    return SidecarPlan(tuple(sorted(files, key=lambda file: file.name)), tuple(sorted({*dropped, *partial})), code)


# --- the base -------------------------------------------------------------------------------------------------------
def _base_files(
    root: str, weight_files: Collection[str], *, replaced: bool
) -> tuple[list[Sidecar], list[tuple[str, str]]]:
    names = io.list_tree(root)
    modules: frozenset[str] = frozenset()
    if MODULES in names:
        path = paths.resolve_inside(root, MODULES)
        modules = module_folders(io.read_file(path, strict_json.MAX_BYTES), path)
    kept = module_weights(names, modules)
    elsewhere = {*weight_files, CONFIG, SAFETENSORS_INDEX}
    if any(name.endswith(".bin") for name in weight_files):
        elsewhere.add(TORCH_BIN_INDEX)
    files, dropped = [], []
    for name in names:
        if name in elsewhere:
            continue
        denied = None if name in kept else left_out(name)
        if denied is None and replaced and is_tokenizer_file(name):
            denied = (name, "replaced by the adapter's tokenizer")
        if denied is None:
            files.append(_sidecar(root, name, BASE))
        else:
            dropped.append(denied)
    return files, dropped


def _sidecar(root: str, name: str, origin: str) -> Sidecar:
    """The file, once it is known to be a readable regular file inside `root`."""
    path = paths.resolve_inside(root, name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UnsafeInputError(posixpath.join(root, name), "its name is not UTF-8") from None
    io.close(io.open_input(path))
    return Sidecar(name, path, origin)


# --- the adapters' tokenizer ----------------------------------------------------------------------------------------
def _adapters_tokenizer(adapters: Sequence[str]) -> tuple[list[Sidecar], list[tuple[str, str]]]:
    """The one whole tokenizer that the adapters bring, or nothing; and the files of tokenizers that are not whole."""
    chosen: list[Sidecar] = []
    partial: list[tuple[str, str]] = []
    for number, root in enumerate(adapters):
        names = [name for name in io.list_tree(root) if is_tokenizer_file(name)]
        if not has_vocabulary(names):
            partial += [
                (name, f"adapter {number + 1} brings part of a tokenizer, without a vocabulary") for name in names
            ]
            continue
        files = [_sidecar(root, name, f"adapter:{number}") for name in names]
        if chosen:
            _check_same(chosen, files)
        chosen = chosen or files
    return chosen, partial


def _check_same(first: Sequence[Sidecar], second: Sequence[Sidecar]) -> None:
    ours, theirs = ({file.name: file.path for file in files} for files in (first, second))
    differing = sorted(
        name for name in ours.keys() | theirs.keys() if not _same_bytes(ours.get(name), theirs.get(name))
    )
    if differing:
        raise CompositionError(
            tuple(differing),
            f"two adapters bring different tokenizers; {len(differing)} of their files differ",
            "keep the tokenizer files of one adapter: move those of the others out of their directories",
        )


def _same_bytes(ours: str | None, theirs: str | None) -> bool:
    if ours is None or theirs is None:
        return False
    return io.read_file(ours, strict_json.MAX_BYTES) == io.read_file(theirs, strict_json.MAX_BYTES)


def _check_size(tokenizer: Sequence[Sidecar], vocab_rows: int | None) -> None:
    if not tokenizer or vocab_rows is None:
        return
    files: Mapping[str, str] = {file.name: file.path for file in tokenizer}
    size = tokenizer_size(files)
    if size is not None and size > vocab_rows:
        raise BaseMismatchError(
            tuple(sorted(files))[:SHOWN],
            f"the adapter's tokenizer has {size:,} ids, the embedding has {vocab_rows:,} rows",
            f"if the adapter does not need its tokenizer, move {some_of(sorted(files))} out of its directory",
        )
