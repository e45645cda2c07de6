"""Parts of the pictures: axes with round numbers, colours for light and dark, text that breaks no markup."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

Scale = Callable[[float], float]

CHARACTER_PX = 6.6
"""Of the pictures' type at 12 px; an estimate, wide rather than narrow."""

INK, MUTED, GRID, PAPER, BAND = "#1f2328", "#59636e", "#d1d9e0", "#ffffff", "#f6f8fa"
DARK = {INK: "#e6edf3", MUTED: "#9198a1", GRID: "#3d444d", PAPER: "#0d1117", BAND: "#151b23"}


@dataclass(frozen=True)
class Hue:
    """A colour on light and on dark paper."""

    light: str
    dark: str


ACCENT = Hue("#0072b2", "#3d9fd9")
ALARM = Hue("#b63a00", "#ff8a4c")


def style(hues: Mapping[str, Hue], extra: str = "") -> str:
    """The picture's style: classes `ink`, `muted`, `grid`, `paper` and `band`, and one for each hue.

    Colours stand in the elements' attributes, too, for viewers that read no style.
    """
    dark = [f".{name}{{fill:{hue.dark}}}.{name}-line{{stroke:{hue.dark}}}" for name, hue in hues.items()]
    names = {"ink": INK, "muted": MUTED, "paper": PAPER, "band": BAND}
    dark += [f".{name}{{fill:{DARK[colour]}}}" for name, colour in names.items()]
    dark.append(f".grid{{stroke:{DARK[GRID]}}}")
    dark.append(f".ink-line{{stroke:{DARK[INK]}}}.muted-line{{stroke:{DARK[MUTED]}}}.paper-line{{stroke:{DARK[PAPER]}}}")
    return f"<style>text{{font-variant-numeric:tabular-nums}}{extra}@media(prefers-color-scheme:dark){{{''.join(dark)}}}</style>"


def label(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "muted", size: int = 0, bold: bool = False) -> str:
    """A line of text."""
    colour = INK if kind == "ink" else MUTED
    more = (f' font-size="{size}"' if size else "") + (' font-weight="600"' if bold else "")
    more += f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" fill="{colour}"{more}>{safe(words)}</text>'


def safe(words: str) -> str:
    """Text as XML and HTML can hold it, within quotes, too: markup escaped, and a stand-in for what does not print.

    That includes characters that no document may have, and those that turn the reading direction.
    """
    return escape("".join(letter if letter.isprintable() or letter in "\n\t" else "�" for letter in words), quote=True)


def cut(words: str, characters: int) -> str:
    """At most so many characters, an ellipsis for the rest."""
    return words if len(words) <= characters else words[: max(1, characters - 1)] + "…"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers, the first at or below `low`, the last at or above `high`."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        low, span = low - abs(low) * 0.05 - 0.005, abs(low) * 0.1 + 0.01
        high = low + span
    size = 10.0 ** math.floor(math.log10(span / wanted))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if span / (size * factor) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def time_ticks(end_s: float, wanted: int) -> list[float]:
    """Round times from 0 to at most `end_s`."""
    steps = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400]
    step = next((step for step in steps if end_s / step <= wanted), 86400 * max(1, math.ceil(end_s / 86400 / wanted)))
    return [float(number * step) for number in range(math.floor(end_s / step) + 1)]


def time_text(seconds: float, end_s: float) -> str:
    """A tick of an axis that ends at `end_s`: "45 s", "2:30", "1:05 h"."""
    whole = round(seconds)
    if end_s < 120:
        return f"{whole} s"
    if end_s < 7200:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def scale(low: float, high: float, begin_px: float, end_px: float) -> Scale:
    """Values to places."""
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return begin_px + (value - low) / span * (end_px - begin_px)

    return place
