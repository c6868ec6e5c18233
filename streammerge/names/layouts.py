"""Which stored tensor is which parts put together: fused and stacked projections, and modules that go by two names.

Owns `layouts.json`, kept by hand: what the modeling code of each family does with the output of its fused module. A
part is always a choice of output features: seen as (groups, sum of sizes), part j is its columns of every group.
The invariant: nothing is guessed. Where sizes and config do not give exactly the length that is there, there are no
lines.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.lines import Lines, all_lines
from streammerge.names.sizes import compute, language_config, letters

DATA = Path(__file__).with_name("layouts.json")
_LETTER = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of what is stored at the module path `fused`, of its expert `expert` if that holds several."""

    fused: str
    index: int
    expert: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """One row for one config.

    `fused`: trailing segments of a module path, `{i}` for an index that parts have too. `spellings`: every way in which
    models name the parts, in the order in which they lie; `{e}` stands for an expert. `groups`, `sizes`: expressions of
    the letters in `values` and T, the length of the output axis; no sizes: there is one part, the whole.
    `experts`: "stacked" (E, ., .) with one matrix for each expert, "rows" (E * x, .) with x rows for each; None: one
    matrix. `transposed`: the model, once the rules of its conversion have acted, has each matrix as (in, out).
    """

    fused: str
    spellings: tuple[tuple[str, ...], ...]
    groups: str
    sizes: tuple[str, ...]
    experts: str | None
    transposed: bool
    values: tuple[tuple[str, int], ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """The first spelling of the parts."""
        return self.spellings[0]

    def lines(self, part: int, total: int) -> Lines:
        """The output features of one matrix, of which there are `total`, that make up part `part`, in its own order.

        Raises ValueError where the config lacks a size or the sizes do not add up to `total`.
        """
        if not self.sizes:
            return all_lines(total)
        known = dict(self.values) | {"T": total}
        groups, sizes = compute(self.groups, known), [compute(size, known) for size in self.sizes]
        widths = [size for size in sizes if size is not None]
        if groups is None or len(widths) < len(sizes):
            raise ValueError(f"the config does not say how the {total} rows of `{self.fused}` are divided")
        pitch = sum(widths)
        if groups * pitch != total or min(groups, *widths) < 1:
            raise ValueError(f"`{self.fused}` has {total} rows, {groups} x {pitch} according to the config")
        start = sum(widths[:part])
        return Lines(start, widths[part], count=groups, pitch=pitch if groups > 1 else 0)

    def block(self, expert: int, total: int) -> Lines:
        """The stored rows, of which there are `total`, of one expert where `experts` is "rows".

        Raises ValueError where the config does not say how many experts there are, or they do not divide `total`.
        """
        count = dict(self.values).get("E")
        if count is None or total % count or not 0 <= expert < count:
            raise ValueError(f"`{self.fused}` has {total} rows, for {count} experts according to the config")
        return Lines(expert * (total // count), total // count)

    def part_of(self, path: str) -> Part | None:
        """Which part the module at `path` is; None if it is none."""
        for spelling in self.spellings:
            for index, pattern in enumerate(spelling):
                found = _match(pattern, path)
                if found is not None:
                    prefix, indices = found
                    expert = indices.get("{e}")
                    return Part(prefix + _fill(self.fused, indices), index, None if expert is None else int(expert))
        return None

    def parts_of(self, path: str, expert: int | None = None) -> tuple[tuple[str, ...], ...]:
        """The paths of all parts of the fused module at `path`, for every spelling; empty if it is none.

        Without `expert`, parts of stacked experts keep their `{e}`.
        """
        found = _match(self.fused, path)
        if found is None:
            return ()
        prefix, indices = found
        if expert is not None:
            indices["{e}"] = str(expert)
        return tuple(tuple(prefix + _fill(part, indices) for part in spelling) for spelling in self.spellings)


def layouts_for(model_type: str | None, config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts that a config.json allows, of all models it is composed of; `model_type` stands in for its own."""
    found: dict[Layout, None] = {}
    for name, own in _models(model_type, config):
        for row in _rows():
            if name in row["types"] and all(own.get(field) in allowed for field, allowed in row["when"].items()):
                found[_layout(row, own)] = None
    return tuple(found)


def _models(model_type: str | None, config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(model type, config its sizes are in) of everything below `config`; `*` is its language model."""
    yield "*", language_config(config)
    if model_type is not None:
        yield model_type, language_config(config)
    left = [config]
    for part in left:
        left.extend(value for value in part.values() if isinstance(value, Mapping))
        if isinstance(part.get("model_type"), str):
            yield part["model_type"], language_config(part)


@functools.cache
def _rows() -> tuple[dict[str, Any], ...]:
    rows = strict_json.loads(io.read_file(DATA, strict_json.MAX_BYTES), str(DATA))["rows"]
    return tuple({"when": {}, **row} for row in rows)


def _layout(row: Mapping[str, Any], config: Mapping[str, Any]) -> Layout:
    groups, sizes = row.get("groups", "1"), tuple(row.get("sizes", ()))
    used = set(_LETTER.findall(" ".join((groups, *sizes)))) | ({"E"} if row.get("experts") == "rows" else set())
    return Layout(
        fused=row["fused"],
        spellings=tuple(tuple(spelling) for spelling in row["parts"]),
        groups=groups,
        sizes=sizes,
        experts=row.get("experts"),
        transposed=row.get("transposed", False),
        values=tuple((letter, value) for letter, value in sorted(letters(config).items()) if letter in used),
    )


# --- module paths -----------------------------------------------------------------------------------------------------
def _match(pattern: str, path: str) -> tuple[str, dict[str, str]] | None:
    """(what stands before, dot included; the indices) if the last segments of `path` are those of `pattern`."""
    wanted, segments = pattern.split("."), path.split(".")
    first = len(segments) - len(wanted)
    if first < 0:
        return None
    indices: dict[str, str] = {}
    for want, segment in zip(wanted, segments[first:], strict=True):
        if want.startswith("{") and segment.isdecimal():
            indices[want] = segment
        elif want != segment:
            return None
    return "".join(f"{segment}." for segment in segments[:first]), indices


def _fill(pattern: str, indices: Mapping[str, str]) -> str:
    return ".".join(indices.get(segment, segment) for segment in pattern.split("."))
