"""What of config.json must change because of what is written, and nothing else.

Edits are (path, value) pairs; the file is written again only if there are any, with its own order of keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from streammerge.core.dtypes import BY_OPTION, IN_CONFIG
from streammerge.core.tensors import OutputTensor
from streammerge.names.architectures import Architecture, sibling
from streammerge.planning.replicate import Edit

DTYPE_FIELDS = ("dtype", "torch_dtype")
HEADS = {
    "score": "ForSequenceClassification",
    "classifier": "ForSequenceClassification",
    "qa_outputs": "ForQuestionAnswering",
}
"""Module names of new heads, and the class of the same model type that has one."""
DEFAULT_LABELS = 2


def dtype_edits(config: Mapping[str, Any], option: str) -> list[Edit]:
    """The dtype fields that follow `--dtype`, in sub-configs too; one is added where there is none."""
    if option == "auto":
        return []
    value = IN_CONFIG[BY_OPTION[option]]
    found = [path for path in _paths(config) if path[-1] in DTYPE_FIELDS and isinstance(_at(config, path), str)]
    return [(path, value) for path in found if _at(config, path) != value] or ([] if found else [(("dtype",), value)])


def vocabulary_edits(config: Mapping[str, Any], rows: Iterable[tuple[int, int]]) -> list[Edit]:
    """`vocab_size` follows the rows of a replaced table: (old, new) pairs."""
    edits: list[Edit] = []
    for old, new in rows:
        fields = [path for path in _paths(config) if path[-1] == "vocab_size"]
        exact = [path for path in fields if _at(config, path) == old]
        edits += [(path, new) for path in exact or fields[:1]]
    return edits


def head_edits(
    config: Mapping[str, Any], new: Sequence[OutputTensor], architecture: Architecture | None, task: str
) -> list[Edit]:
    """The class and the number of labels that a new head asks for."""
    edits: list[Edit] = []
    for output in new:
        module, _, parameter = output.name.rpartition(".")
        suffix = HEADS.get(module.split(".")[0])
        if suffix is None or parameter != "weight" or architecture is None:
            continue
        if task == "TOKEN_CLS":
            suffix = "ForTokenClassification"
        named = sibling(architecture.model_type, suffix)
        if named and config.get("architectures") != [named]:
            edits.append((("architectures",), [named]))
        labels = (
            len(config["id2label"])
            if isinstance(config.get("id2label"), Mapping)
            else config.get("num_labels", DEFAULT_LABELS)
        )
        if output.shape[0] != labels and suffix != "ForQuestionAnswering":
            edits += [
                (("id2label",), {str(n): f"LABEL_{n}" for n in range(output.shape[0])}),
                (("label2id",), {f"LABEL_{n}": n for n in range(output.shape[0])}),
            ]
    return edits


def edited(config: Mapping[str, Any], edits: Sequence[Edit]) -> bytes:
    """config.json with the edits made."""
    changed: dict[str, Any] = deepcopy(dict(config))
    for path, value in edits:
        section = changed
        for name in path[:-1]:
            section = section.setdefault(name, {})
        section[path[-1]] = value
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _paths(config: Mapping[str, Any], at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of the config and its sub-configs, outer ones first."""
    own = [(*at, name) for name, value in config.items() if not isinstance(value, Mapping)]
    inner = [
        path for name, value in config.items() if isinstance(value, Mapping) for path in _paths(value, (*at, name))
    ]
    return own + inner


def _at(config: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = config
    for name in path:
        value = value[name]
    return value
