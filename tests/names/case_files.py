"""The data files in `cases/`: read strictly, expanded, and made into tiny checkpoints and adapters.

The format is described in cases/README.md. The invariant: a field that is not known is an error, so that a misspelled
claim never passes for one that was checked.
"""

from __future__ import annotations

import itertools
import json
import re
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from streammerge.core.lines import Lines, all_lines
from streammerge.core.tensors import FactorView, Operation

FOLDER = Path(__file__).with_name("cases")
BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True)
class Target:
    """One operation of the plan, as a file states it; the names of the fields are those of the format."""

    module: str
    tensor: str
    rule: str
    rows: str = ":"
    cols: str = ":"
    matrix: int | None = None
    transposed: bool = False
    out: str = ":"
    into: str = ":"
    expert: str = ""
    formula: str = "lora"


@dataclass(frozen=True, slots=True)
class Case:
    """One adapter, and what the plan must be or why there is none."""

    name: str
    tensors: Mapping[str, tuple[int, ...]]
    base_config: Mapping[str, Any] | None
    keys: Mapping[str, tuple[int, ...]]
    adapter_config: Mapping[str, Any]
    targets: tuple[Target, ...]
    replaced: Mapping[str, str]
    new: tuple[str, ...]
    edits: Mapping[str, Any]
    notes: tuple[str, ...]
    refused: Mapping[str, Any]
    options: Mapping[str, Any]
    rules: str


def read_cases() -> list[Case]:
    """Every case of every file."""
    return [case for path in sorted(FOLDER.glob("*.toml")) for case in parse(path.stem, path.read_text())]


def parse(stem: str, text: str) -> Iterator[Case]:
    """The cases of one file. Raises ValueError for a field that is unknown, missing or contradicts another."""
    content = tomllib.loads(text)
    _known(stem, content, {"base", "case"})
    _known(stem, content["base"], {"config", "tensors"})
    tensors = _shapes(content["base"]["tensors"])
    optional = {"config", "keys", "lora", "target", "replaced", "new", "edits", "notes", "refused", "options", "rules"}
    for raw in content["case"]:
        where = f"{stem}: {raw['name']}"
        _known(where, raw, {"name", *optional})
        if ("target" in raw) == ("refused" in raw):
            raise ValueError(f"{where}: either targets or a refusal")
        refused = raw.get("refused", {})
        _known(where, refused, {"error", "says", "exit_code"})
        yield Case(
            name=where,
            tensors=tensors,
            base_config=content["base"].get("config"),
            keys={**_factor_keys(raw.get("lora", {})), **_shapes(raw.get("keys", {}))},
            adapter_config={"peft_type": "LORA", "r": 2, "lora_alpha": 4, **raw.get("config", {})},
            targets=tuple(target for row in raw.get("target", ()) for target in _targets(where, row)),
            replaced=raw.get("replaced", {}),
            new=tuple(name for pattern in raw.get("new", ()) for name in expanded(pattern)),
            edits=raw.get("edits", {}),
            notes=tuple(raw.get("notes", ())),
            refused=refused,
            options=raw.get("options", {}),
            rules=raw.get("rules", ""),
        )


def _known(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    if unknown := table.keys() - known:
        raise ValueError(f"{where}: unknown field {sorted(unknown)}")


# --- names ------------------------------------------------------------------------------------------------------------
def expanded(name: str) -> list[str]:
    """A name with `{0..3}` and `{gate,up}` as all the names it stands for."""
    found = BRACES.search(name)
    if found is None:
        return [name]
    return [name[: found.start()] + own + rest for own in _own(found[1]) for rest in expanded(name[found.end() :])]


def _own(text: str) -> list[str]:
    first, dots, last = text.partition("..")
    return [str(number) for number in range(int(first), int(last) + 1)] if dots else text.split(",")


def _shapes(table: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    return _once((name, tuple(shape)) for pattern, shape in table.items() for name in expanded(pattern))


def _factor_keys(table: Mapping[str, list[int]]) -> dict[str, tuple[int, ...]]:
    """`[rank, in, out]` of a linear module as the two keys of its factors; `[rank, in, out, E]` of E experts."""
    found = []
    for pattern, (rank, into, out, *experts) in table.items():
        rows = rank * (experts[0] if experts else 1)
        for name in expanded(pattern):
            found += [(f"{name}.lora_A.weight", (rows, into)), (f"{name}.lora_B.weight", (out, rows))]
    return _once(found)


def _once(pairs: Any) -> dict[str, tuple[int, ...]]:
    listed = list(pairs)
    if len(dict(listed)) < len(listed):
        raise ValueError("a name is there twice")
    return dict(listed)


def _targets(where: str, row: Mapping[str, Any]) -> Iterator[Target]:
    """The targets of a row: one, or one for each choice of the variables in `each`."""
    _known(where, row, {*(item.name for item in fields(Target)), "each"})
    variables = {name: _own(text) for name, text in row.get("each", {}).items()}
    plain = {name: value for name, value in row.items() if name != "each"}
    for values in itertools.product(*variables.values()):
        chosen = {name: _filled(value, dict(zip(variables, values, strict=True))) for name, value in plain.items()}
        if "matrix" in chosen:
            chosen["matrix"] = int(chosen["matrix"])
        yield Target(**chosen)


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if not isinstance(value, str):
        return value
    return BRACES.sub(lambda found: str(_sum(found[1], variables)), value)


def _sum(text: str, variables: Mapping[str, str]) -> str | int:
    """`e`, or `e*4` and `e*4+2` of a number."""
    name, times, rest = text.partition("*")
    if not times:
        return variables[name]
    factor, _, offset = rest.partition("+")
    return int(variables[name]) * int(factor) + int(offset or 0)


# --- plans -----------------------------------------------------------------------------------------------------------
def said(lines_: Lines, total: int) -> str:
    """Lines in the words of the format."""
    if lines_ == all_lines(total):
        return ":"
    if lines_.count > 1:
        return f"{lines_.start}+{lines_.size}*{lines_.count}/{lines_.pitch}" + f":{lines_.step}" * (lines_.step > 1)
    return f"{lines_.start}:{lines_.end}" + f":{lines_.step}" * (lines_.step > 1)


def target_of(operation: Operation, keys: Mapping[str, tuple[int, ...]]) -> Target:
    """An operation of a plan as a file would state it."""
    place = operation.place
    factors = {"out": ":", "into": ":", "expert": ""}
    if operation.formula == "lora":
        factors = _factors(operation, keys)
    return Target(
        module=operation.module,
        tensor=place.tensor,
        rule=said_rule(operation.rule),
        rows=said(place.rows, place.view.rows),
        cols=said(place.cols, place.view.cols),
        matrix=place.matrix if place.view.stack > 1 else None,
        transposed=place.transposed,
        formula=operation.formula,
        **factors,
    )


def said_rule(rule: str) -> str:
    """A rule without the numbers of the table's rows, which change with every transformers."""
    how, comma, rows = rule.partition(", ")
    return how + comma + " ".join(dict.fromkeys(re.sub(r"\[\d+\]", "", rows).split()))


def _factors(operation: Operation, keys: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Which outputs of B and which inputs of A an operation uses, and whose rank rows and columns, if not all."""
    b, a = operation.factors["left"], operation.factors["right"]
    if operation.place.transposed:
        b, a = a.t, b.t
    assert "lora_B" in b.key
    assert "lora_A" in a.key
    out, b_ranks = _axes(b, keys[b.key])
    a_ranks, into = _axes(a, keys[a.key])
    (rows, width), (outputs, _) = keys[a.key], keys[b.key]
    found = {"out": said(out, outputs), "into": said(into, width), "expert": ""}
    if a_ranks == b_ranks == all_lines(rows):
        return found
    count = rows // a_ranks.total
    expert = a_ranks.start // a_ranks.total
    assert a_ranks == Lines(expert * a_ranks.total, a_ranks.total)
    packing = {Lines(expert, a_ranks.total, count): "", a_ranks: " grouped"}[b_ranks]
    return {**found, "expert": f"{expert}/{count}{packing}"}


def _axes(view: FactorView, shape: tuple[int, ...]) -> tuple[Lines, Lines]:
    """The rows and columns of the adapter's tensor that a view takes."""
    width = shape[1]
    numbers = np.add.outer(*(axis.array() for axis in view.axes))
    rows, cols = np.divmod(numbers, width)
    assert (rows == rows[:, :1]).all()
    assert (cols == cols[:1]).all()
    return _lines_of(rows[:, 0].tolist()), _lines_of(cols[0].tolist())


def _lines_of(numbers: list[int]) -> Lines:
    """Numbers as lines: one run, or runs of one size at equal distances."""
    size = next((n for n in range(1, len(numbers)) if numbers[n] - numbers[n - 1] != numbers[1] - numbers[0]), 0)
    size = size or len(numbers)
    step = numbers[1] - numbers[0] if size > 1 else 1
    count = len(numbers) // size
    found = Lines(numbers[0], size, step, count, numbers[size] - numbers[0] if count > 1 else 0)
    assert found.array().tolist() == numbers
    return found


# --- files ------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Files:
    """Where the files of a case are."""

    root: Path
    base: Path = field(init=False)
    adapter: Path = field(init=False)

    def __post_init__(self) -> None:
        self.base, self.adapter = self.root / "base", self.root / "adapter"


def write(case: Case, root: Path) -> Files:
    """The base and the adapter of a case, with values that follow from the names."""
    files = Files(root)
    for folder, name, shapes, config in (
        (files.base, "model.safetensors", case.tensors, case.base_config),
        (files.adapter, "adapter_model.safetensors", case.keys, case.adapter_config),
    ):
        folder.mkdir()
        save_file({key: _values(key, shape) for key, shape in shapes.items()}, folder / name, {"format": "pt"})
        if config is not None:
            file = "config.json" if folder is files.base else "adapter_config.json"
            (folder / file).write_text(json.dumps(config))
    return files


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    values: np.ndarray[Any, Any] = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    return values
