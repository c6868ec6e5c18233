"""A chart of dots in SVG: a line for each case, a dot for each contender, two figures side by side on scales of powers.

Text that this file writes itself, so that the same figures are the same bytes everywhere, and nothing has to be
installed to draw them. Equal distances are equal ratios; a scale begins and ends at 1, 2 or 5 times a power of ten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#7f7f7f", "#d62728", "#1f77b4", "#9467bd", "#2ca02c", "#ff7f0e")
LINE, TOP, LABELS, PANEL, GAP, MARGIN = 26, 64, 150, 380, 40, 24
DOT = 5.5
INK, GRID = "#333333", "#dddddd"


@dataclass(frozen=True)
class Mark:
    """The two figures of a contender: left, and right where it has one."""

    left: float
    right: float | None = None


Row = Mapping[str, Mark]


def ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, the first not above any value and the last not below any."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    every = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in (1, 2, 5)]
    first = max(tick for tick in every if tick <= min(values))
    last = min(tick for tick in every if tick >= max(values))
    return [tick for tick in every if first <= tick <= last]


def text(at: tuple[float, float], words: str, anchor: str = "start", *, bold: bool = False) -> str:
    """A line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{at[0]:.1f}" y="{at[1]:.1f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def panel(rows: Sequence[Mapping[str, float]], colours: Mapping[str, str], title: str, left: float) -> list[str]:
    """One figure of every case: its scale, and the dots."""
    scale = ticks([value for row in rows for value in row.values()] or [1.0])
    low, span = math.log(scale[0]), math.log(scale[-1] / scale[0]) or 1.0

    def across(value: float) -> float:
        return left + PANEL * (math.log(value) - low) / span

    bottom = TOP + LINE * len(rows)
    drawn = [text((left, TOP - 14), title, bold=True)]
    for tick in scale:
        x = across(tick)
        drawn.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" stroke="{GRID}"/>')
        drawn.append(text((x, bottom + 18), f"{tick:g}", "middle"))
    for number, row in enumerate(rows):
        y = TOP + LINE * (number + 0.5)
        for name, value in row.items():
            dot = f'<circle cx="{across(value):.1f}" cy="{y:.1f}" r="{DOT}" fill="{colours[name]}" fill-opacity="0.85">'
            drawn.append(f"{dot}<title>{escape(name)}: {value:.3g}</title></circle>")
    return drawn


def chart(rows: Mapping[str, Row], titles: Mapping[str, str], figures: tuple[str, str]) -> str:
    """The chart: `rows` by label, contenders' `titles` in the order of their colours, what the two figures are."""
    if not any(rows.values()):
        raise SystemExit("there is nothing to draw")
    present = [name for name in titles if any(name in row for row in rows.values())]
    colours = dict(zip(titles, COLOURS, strict=False))
    width = LABELS + 2 * PANEL + GAP + 2 * MARGIN
    height = TOP + LINE * len(rows) + 40
    drawn = [f'<rect width="{width}" height="{height}" fill="white"/>']
    across = float(LABELS + MARGIN)
    for name in present:
        drawn.append(f'<circle cx="{across:.1f}" cy="16" r="{DOT}" fill="{colours[name]}"/>')
        drawn.append(text((across + 10, 20), titles[name]))
        across += 34 + 6.6 * len(titles[name])
    for number, label in enumerate(rows):
        drawn.append(text((LABELS + MARGIN - 14, TOP + LINE * (number + 0.5) + 4), label, "end"))
    lefts = [{name: mark.left for name, mark in row.items()} for row in rows.values()]
    rights = [{name: mark.right for name, mark in row.items() if mark.right} for row in rows.values()]
    drawn += panel(lefts, colours, figures[0], LABELS + MARGIN)
    drawn += panel(rights, colours, figures[1], LABELS + MARGIN + PANEL + GAP)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join([f'{head} font-family="sans-serif" font-size="12" fill="{INK}">', *drawn, "</svg>\n"])
