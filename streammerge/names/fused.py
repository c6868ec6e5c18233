"""Parts of fused modules, and fused modules stored in parts: the table of layouts, joined with a catalog.

What comes out is a parameter like any other, in the orientation (out, in), so that nothing after this knows of fusing.
The invariant: a layout is used only where its sizes give exactly the shapes of what is stored and of what is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from streammerge.core.lines import Lines, all_lines
from streammerge.names.catalog import Catalog
from streammerge.names.layouts import Layout, Part, layouts_for
from streammerge.names.pieces import Axis, Parameter, Piece, Sizes, suits, through


class Fused:
    """Finds modules of one base that are stored in another grouping than the adapter names them in."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    @functools.cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts of this base's model; read when something is not found without them."""
        architecture = self.catalog.architecture
        return layouts_for(architecture.model_type if architecture else None, self.catalog.config)

    def find(self, name: str, shape: Sizes) -> Iterator[tuple[Parameter, str]]:
        """Parameters of that `shape`, (out, in) or (out,), that the name may stand for, each with its rule; what is not
        known of the shape, the layout says."""
        module, _, kind = name.rpartition(".")
        for layout in self.layouts:
            part = layout.part_of(module)
            if part and (found := self._part(layout, part, kind, name, shape)):
                yield found, f"fused: part {part.index + 1} of {len(layout.parts)} of `{layout.fused}`"
            for paths in layout.parts_of(module):
                if found := self._whole(layout, [f"{path}.{kind}" for path in paths], name, shape):
                    yield found, f"split: `{layout.fused}` is stored as {len(paths)} modules"

    def tried(self, name: str) -> list[str]:
        """What the table knows `name` as a part of, or as made of, as far as it is stored: names with their rule."""
        module, _, kind = name.rpartition(".")
        found: list[str] = []
        for layout in self.layouts:
            part = layout.part_of(module)
            if part and (self._lookup(f"{part.fused}.{kind}") or self._lookup(part.fused)):
                found.append(f"{part.fused} (fused)")
            for paths in layout.parts_of(module):
                parts = [f"{path}.{kind}" for path in paths]
                if any(self._lookup(path) for path in parts):
                    found += [f"{path} (split)" for path in parts if not self._lookup(path)]
        return list(dict.fromkeys(found))

    def _lookup(self, name: str) -> Parameter | None:
        catalog = self.catalog
        return (
            catalog.parameter(name)
            or catalog.tensor(name)
            or catalog.prefixed(name)
            or catalog.translated(name, None)  # the adapter's era, or the row, may call the fused module otherwise
        )

    def _part(self, layout: Layout, part: Part, kind: str, name: str, shape: Sizes) -> Parameter | None:
        """The part of a stored module."""
        found = self._lookup(f"{part.fused}.{kind}") or (self._lookup(part.fused) if kind == "weight" else None)
        if found is None:
            return None
        for transposed in (layout.transposed, not layout.transposed):
            try:
                piece = _part_piece(layout, part, found, shape, transposed=transposed)
            except ValueError:
                continue
            return replace(through(name, found.dtype, [piece], {found.name: found}), rules=found.rules)
        return None

    def _whole(self, layout: Layout, names: list[str], name: str, sizes: Sizes) -> Parameter | None:
        """The whole of a module that is stored in parts."""
        if layout.experts or not all(found := [self._lookup(part) for part in names]):
            return None
        parts = [part for part in found if part]
        stored = sum(part.shape[0] for part in parts), *parts[0].shape[1:]
        shape = tuple(size if want is None else want for size, want in zip(stored, sizes, strict=False))
        try:
            rows = [layout.lines(number, shape[0]) for number in range(len(parts))]
            pieces = [_whole_piece(part, lines, shape) for part, lines in zip(parts, rows, strict=True)]
        except ValueError:
            return None
        return through(name, parts[0].dtype, pieces, {part.name: part for part in parts})


def _part_piece(layout: Layout, part: Part, found: Parameter, shape: Sizes, *, transposed: bool) -> Piece:
    """A part as a piece of the stored module `found`. Raises ValueError where the sizes do not agree."""
    sizes = found.shape
    stacked = layout.experts == "stacked"
    if len(sizes) != len(shape) + stacked or (part.expert is None) == bool(layout.experts):
        raise ValueError("another number of axes")
    if stacked and not 0 <= (part.expert or 0) < sizes[0]:
        raise ValueError("no such expert")
    first = int(stacked)
    ranges = {number: all_lines(size) for number, size in enumerate(sizes) if number >= first}
    if layout.experts == "rows":
        ranges[0] = layout.block(part.expert or 0, sizes[0])
    out, into = (first + 1, first) if transposed and len(shape) == 2 else (first, first + 1)
    ranges[out] = layout.lines(part.index, ranges[out].total).shifted(ranges[out].start)
    axes = tuple(Axis(n, all_lines(ranges[n].total), ranges[n]) for n in (out, into)[: len(shape)])
    if not suits([axis.here.total for axis in axes], shape):
        raise ValueError("another shape")
    return Piece(found.name, sizes, axes, ((0, part.expert or 0),) if stacked else ())


def _whole_piece(part: Parameter, lines: Lines, shape: tuple[int, ...]) -> Piece:
    """A stored part as a piece of the whole of `shape`."""
    if part.shape != (lines.total, *shape[1:]):
        raise ValueError("another shape")
    axes = [Axis(0, lines, all_lines(lines.total))]
    axes += [Axis(number, all_lines(size), all_lines(size)) for number, size in enumerate(shape) if number]
    return Piece(part.name, part.shape, tuple(axes))
