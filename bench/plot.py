"""Lines over an axis, as an SVG that a page can show: for curves that a table cannot tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 34, 46
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700")
INK, GRID = "#57606a", "#d0d7de"


@dataclass(frozen=True)
class Panel:
    """One picture. `lines` maps a name to its points (x, y), in the order in which they are joined."""

    title: str
    x_name: str
    y_name: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def svg(panels: Sequence[Panel]) -> str:
    """The panels side by side, with one legend; colours go by the names' order in the first panel, dashed once they are used up."""
    names = list(panels[0].lines)
    stroke = {name: _stroke(number) for number, name in enumerate(names)}
    height = HEIGHT + 22 * math.ceil(len(names) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * len(panels)} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, panel in enumerate(panels):
        parts.append(f'<g transform="translate({number * WIDTH} 0)">{_panel(panel, stroke)}</g>')
    for number, name in enumerate(names):
        x, y = LEFT + (number % 2) * WIDTH, HEIGHT + 8 + 22 * (number // 2)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 22}" y2="{y}" {stroke[name]} stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _stroke(number: int) -> str:
    dashes = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
    return f'stroke="{COLOURS[number % len(COLOURS)]}"{dashes}'


def _panel(panel: Panel, stroke: Mapping[str, str]) -> str:
    points = [point for line in panel.lines.values() for point in line]
    xs, ys = _ticks(0.0, max(x for x, _ in points)), _ticks(min(y for _, y in points), max(y for _, y in points))

    def at_x(value: float) -> float:
        return LEFT + (value - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - ys[0]) / (ys[-1] - ys[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{LEFT}" y="18" font-size="14" font-weight="600" fill="#1f2328">{escape(panel.title)}</text>']
    for tick in ys:
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in xs:
        parts.append(f'<text x="{at_x(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 10}" text-anchor="end">{escape(panel.x_name)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="18" text-anchor="end">{escape(panel.y_name)}</text>')
    for name, line in panel.lines.items():
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" {stroke[name]} stroke-width="2"/>')
    return "\n".join(parts)


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that enclose the range."""
    span = (high - low) or 1.0
    size = 10 ** math.floor(math.log10(span / wanted))
    step = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= wanted)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]
