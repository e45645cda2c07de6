"""A run as an SVG picture: a lane for each device with what it was at by colour, its faults as lettered marks, rounds across."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fleetune.coordinator.figures import count_text, duration_text
from fleetune.coordinator.testbed import drawing
from fleetune.coordinator.testbed.drawing import Hue, label, safe
from fleetune.coordinator.testbed.lanes import ACTIVITIES, Activity, Fault, Lane, Stretch
from fleetune.coordinator.testbed.runfigures import RoundFigures, RunFigures

WIDTH = 1120
RIGHT, TOP = 18, 62
NAME_CHARACTERS_MAX = 22
MANY = 12
"""From here on lanes are narrower."""

COLUMNS_PER_LANE_MAX = 1800
"""Stretches beyond this are told by the column of pixels, so that a day's run is no file of megabytes."""

# Okabe and Ito's colours, which people of every colour vision tell apart; what stands still has a pattern instead.
HUES: dict[str, Hue] = {
    "download": Hue("#56b4e9", "#56b4e9"),
    "load": Hue("#f0e442", "#e2d63c"),
    "measure": Hue("#cc79a7", "#d78bb5"),
    "compute": Hue("#0072b2", "#2b86c5"),
    "evaluate": Hue("#009e73", "#12a97f"),
    "upload": Hue("#e69f00", "#e8a40f"),
    "prepare": Hue("#f0e442", "#e2d63c"),
    "collect": Hue("#a9bdd1", "#5f7891"),
    "fold": Hue("#24292f", "#f0f3f6"),
    "idle": Hue("#e3e7eb", "#2a313a"),
}
WORDS: dict[Activity, str] = {
    "download": "downloads",
    "load": "loads",
    "measure": "measures itself",
    "compute": "trains",
    "evaluate": "evaluates",
    "upload": "uploads",
    "prepare": "prepares the base",
    "collect": "waits for training",
    "fold": "folds",
    "idle": "idle",
    "paused": "paused",
    "down": "down",
    "unknown": "not known",
}
LETTERS = {"kill": "K", "pause": "P", "cut": "C", "throttle": "T", "fill_disk": "D", "out_of_memory": "M"}
FAULT_WORDS = {
    "kill": "killed",
    "pause": "paused",
    "cut": "link cut",
    "throttle": "link throttled",
    "fill_disk": "disk full",
    "out_of_memory": "out of memory",
}


def timeline(figures: RunFigures) -> str:
    """The whole picture as a document of its own; readable from a handful of lanes to some dozens."""
    lanes = figures.lanes
    pitch = 30.0 if len(lanes) <= MANY else 19.0
    names = [drawing.cut(lane.member, NAME_CHARACTERS_MAX) for lane in lanes]
    left = 26 + max(drawing.CHARACTER_PX * len(name) for name in names)
    end_s = max(figures.wall_s, 1.0)
    at = drawing.scale(0.0, end_s, left, WIDTH - RIGHT)
    bottom = TOP + pitch * len(lanes) + (6 if len(lanes) > 1 else 0)
    legend, rows = _legend(lanes, bottom + 40)
    height = bottom + 44 + 20 * rows
    title = f"{figures.testbed or 'testbed'}: {count_text(len(lanes) - 1, 'device')}, {duration_text(figures.wall_s)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="system-ui, sans-serif" font-size="12" '
        f'role="img" aria-label="{safe(f"Time line of {title}")}">',
        drawing.style({**HUES, "alarm": drawing.ALARM}),
        _patterns(),
        f'<rect class="paper" fill="{drawing.PAPER}" width="{WIDTH}" height="{height:.0f}"/>',
        label(left, 20, title + (f", job {figures.job}" if figures.job else ""), kind="ink", size=14, bold=True),
        label(WIDTH - RIGHT, 20, figures.status, anchor="end"),
    ]
    tops = [TOP + pitch * index + (6 if index == len(lanes) - 1 and index else 0) for index in range(len(lanes))]
    for index, top in enumerate(tops):
        if index % 2 == 0:
            parts.append(f'<rect class="band" fill="{drawing.BAND}" x="0" y="{top:.1f}" width="{WIDTH}" height="{pitch:.1f}"/>')
    parts += _time_axis(end_s, at, bottom)
    for lane, name, top in zip(lanes, names, tops, strict=True):
        parts += _lane(lane, name, left, top, pitch, end_s, at)
    parts += _rounds(figures.rounds, at, bottom)
    for lane, top in zip(lanes, tops, strict=True):
        parts += _marks(lane, top, pitch, end_s, at)
    return "\n".join([*parts, *legend, "</svg>", ""])


def _patterns() -> str:
    """What does not run at all has no colour of its own; stripes and dots are told apart in print, too."""
    back, alarm = f'<rect class="paper" fill="{drawing.PAPER}" width="6" height="6"/>', drawing.ALARM.light
    stripes = f'{back}<rect class="alarm" fill="{alarm}" width="2.4" height="6"/>'
    dots = f'{back}<circle class="ink" fill="{drawing.INK}" cx="3" cy="3" r="1.4"/>'
    size = 'width="6" height="6" patternUnits="userSpaceOnUse"'
    return (
        f'<defs><pattern id="tl-down" {size} patternTransform="rotate(45)">{stripes}</pattern>'
        f'<pattern id="tl-paused" {size}>{dots}</pattern></defs>'
    )


def _box(activity: Activity, x: float, y: float, width: float, height: float, tip: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    inner = f"<title>{safe(tip)}</title>" if tip else ""
    if activity in ("down", "paused"):
        return f'<rect {place} fill="url(#tl-{activity})">{inner}</rect>'
    if activity == "unknown":
        return f'<rect {place} fill="none" class="grid" stroke="{drawing.GRID}" stroke-dasharray="3 3">{inner}</rect>'
    return f'<rect {place} class="{activity}" fill="{HUES[activity].light}">{inner}</rect>'


def _lane(lane: Lane, name: str, left: float, top: float, pitch: float, end_s: float, at: drawing.Scale) -> Iterable[str]:
    strip = 6.0 if pitch > 20 else 4.0
    bar, height = top + strip + 1, pitch - strip - (5 if pitch > 20 else 3)
    about = f"{lane.member}{f' ({lane.kind})' if lane.kind else ''}"
    yield f"<g><title>{safe(about)}</title>{label(left - 18, bar + height / 2 + 4.2, name, anchor='end', kind='ink')}</g>"
    for stretch in _drawable(lane.stretches, end_s, at):
        begin, end = max(0.0, stretch.begin_s), min(end_s, stretch.end_s)
        if end <= begin:
            continue
        # What idles is a line rather than a block: the eye goes to work and to trouble.
        thin = stretch.activity == "idle"
        y, high = (bar + height / 2 - 1.5, 3.0) if thin else (bar, height)
        tip = f"{lane.member} {WORDS[stretch.activity]}, {_from_to(begin, end)}"
        yield _box(stretch.activity, at(begin), y, max(0.4, at(end) - at(begin)), high, tip)


def _from_to(begin_s: float, end_s: float) -> str:
    return f"{begin_s:.1f} s to {end_s:.1f} s ({duration_text(end_s - begin_s)})"


def _drawable(stretches: Sequence[Stretch], end_s: float, at: drawing.Scale) -> Sequence[Stretch]:
    """As they are, or where they are too many, what each column of pixels has the most of."""
    if len(stretches) <= COLUMNS_PER_LANE_MAX:
        return stretches
    columns = int(at(end_s) - at(0.0)) or 1
    width_s = end_s / columns
    weights: list[dict[Activity, float]] = [{} for _ in range(columns)]
    for stretch in stretches:
        first, last = (min(columns - 1, max(0, int(when / width_s))) for when in (stretch.begin_s, stretch.end_s))
        for column in range(first, last + 1):
            within = min(stretch.end_s, (column + 1) * width_s) - max(stretch.begin_s, column * width_s)
            if within > 0:
                weights[column][stretch.activity] = weights[column].get(stretch.activity, 0.0) + within
    found: list[Stretch] = []
    for column, weight in enumerate(weights):
        if not weight:
            continue
        most = max(weight, key=lambda activity: weight[activity])
        begin, end = column * width_s, (column + 1) * width_s
        if found and found[-1].activity == most and math.isclose(found[-1].end_s, begin):
            found[-1] = Stretch(most, found[-1].begin_s, end)
        else:
            found.append(Stretch(most, begin, end))
    return found


def _marks(lane: Lane, top: float, pitch: float, end_s: float, at: drawing.Scale) -> Iterable[str]:
    strip = 4.0 if pitch > 20 else 3.0
    for fault in lane.faults:
        if not 0 <= fault.begin_s <= end_s:
            continue
        x = at(fault.begin_s)
        until = end_s if fault.end_s is None else min(end_s, fault.end_s)
        tip = _fault_tip(fault)
        if until > fault.begin_s:
            yield (
                f'<rect class="alarm" fill="{drawing.ALARM.light}" x="{x:.1f}" y="{top + 1:.1f}" width="{max(1.0, at(until) - x):.1f}" '
                f'height="{strip:.1f}"><title>{safe(tip)}</title></rect>'
            )
        yield _mark(LETTERS.get(fault.kind, "?"), x, top + pitch / 2 + 0.5, tip, pitch > 20, hollow=False)
    for killing in lane.killings:
        if 0 <= killing.at_s <= end_s:
            tip = f"the kernel killed {killing.processes} in {lane.member} for lack of memory, seen at {killing.at_s:.1f} s"
            yield _mark("M", at(killing.at_s), top + pitch / 2 + 0.5, tip, pitch > 20, hollow=True)


def _fault_tip(fault: Fault) -> str:
    what = fault.text or f"{FAULT_WORDS.get(fault.kind, fault.kind)}: {fault.member}"
    if fault.end_s is None:
        return f"{what}; at {fault.begin_s:.1f} s, not undone"
    return f"{what}; at {fault.begin_s:.1f} s" + (f", undone at {fault.end_s:.1f} s" if fault.end_s > fault.begin_s else "")


def _mark(letter: str, x: float, y: float, tip: str, large: bool, *, hollow: bool) -> str:
    """It ends at `x`, so that it hides nothing of what came after it."""
    radius, size = (8.0, 11) if large else (6.5, 9)
    x -= radius
    tone = f'class="paper alarm-line" fill="{drawing.PAPER}" stroke="{drawing.ALARM.light}" stroke-width="1.6"'
    if not hollow:
        tone = f'class="alarm paper-line" fill="{drawing.ALARM.light}" stroke="{drawing.PAPER}" stroke-width="1.2"'
    colour = f'class="alarm" fill="{drawing.ALARM.light}"' if hollow else f'class="paper" fill="{drawing.PAPER}"'
    font = f'font-size="{size}" font-weight="700" text-anchor="middle"'
    title = f"<title>{safe(tip)}</title>" if tip else ""
    return (
        f'<g>{title}<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" {tone}/>'
        f'<text x="{x:.1f}" y="{y + size * 0.36:.1f}" {font} {colour}>{letter}</text></g>'
    )


def _time_axis(end_s: float, at: drawing.Scale, bottom: float) -> Iterable[str]:
    for tick in drawing.time_ticks(end_s, 12):
        x = at(tick)
        yield f'<line class="grid" stroke="{drawing.GRID}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:.1f}" y2="{bottom + 4:.1f}"/>'
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        yield label(x, bottom + 17, drawing.time_text(tick, end_s), anchor=anchor)


def _rounds(rounds: Sequence[RoundFigures], at: drawing.Scale, bottom: float) -> Iterable[str]:
    """A dashed line where each round was committed, its number above; every other number where there is no room for all."""
    if not rounds:
        return
    yield label(at(0) - 18, TOP - 8, "round", anchor="end")
    free_from = -math.inf
    for item in rounds:
        begin, end = at(max(0.0, item.begin_s)), at(item.end_s)
        tip = f"round {item.number}: {_from_to(item.begin_s, item.end_s)}, {item.folded} of {item.asked} folded"
        place = f'x1="{end:.1f}" x2="{end:.1f}" y1="{TOP - 20:.1f}" y2="{bottom:.1f}"'
        line = f'<line class="muted-line" stroke="{drawing.MUTED}" stroke-dasharray="2 3" {place}/>'
        yield f"<g><title>{safe(tip)}</title>{line}</g>"
        words = str(item.number)
        middle, half = (begin + end) / 2, drawing.CHARACTER_PX * len(words) / 2
        if middle - half > free_from:
            yield label(middle, TOP - 8, words, anchor="middle", kind="ink")
            free_from = middle + half + 4


def _legend(lanes: Sequence[Lane], top: float) -> tuple[list[str], int]:
    """Only what the picture has; and how many rows it takes."""
    present = {stretch.activity for lane in lanes for stretch in lane.stretches}
    made = [kind for kind in LETTERS if any(fault.kind == kind for lane in lanes for fault in lane.faults)]
    killed = any(lane.killings for lane in lanes)
    states: list[tuple[str, str]] = [
        (_box(activity, 0, -9, 18, 11) if activity != "idle" else _box(activity, 0, -5, 18, 3), WORDS[activity])
        for activity in ACTIVITIES
        if activity in present
    ]
    marks: list[tuple[str, str]] = [("", "faults made:")] if made else []
    marks += [(_mark(LETTERS[kind], 17, -4, "", True, hollow=False), FAULT_WORDS[kind]) for kind in made]
    if killed:
        marks.append((_mark("M", 17, -4, "", True, hollow=True), "unasked: killed by the kernel for lack of memory"))
    parts: list[str] = []
    row = 0
    for entries in (states, marks):
        x = 18.0
        for picture, words in entries:
            width = (26 if picture else 0) + drawing.CHARACTER_PX * len(words) + 18
            if x + width > WIDTH and x > 18:
                x, row = 18.0, row + 1
            parts.append(f'<g transform="translate({x:.1f} {top + 20 * row:.1f})">{picture}</g>')
            parts.append(label(x + (25 if picture else 0), top + 20 * row, words))
            x += width
        row += bool(entries)
    return parts, row
