"""The metric over what it cost, as an SVG picture: every round a dot, the best so far a line."""

from __future__ import annotations

from fleetune.coordinator.figures import bytes_text, duration_text, metric_text
from fleetune.coordinator.testbed import drawing
from fleetune.coordinator.testbed.drawing import label, safe
from fleetune.coordinator.testbed.runfigures import SHARES, Cost, Point, RunFigures, best_until

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 30, 40

COST_WORDS: dict[Cost, str] = {
    "wall_s": "wall time",
    "sent_bytes": "bytes sent by devices",
    "upload_bytes": "bytes of updates",
    "cpu_s": "CPU seconds of devices",
    "energy_j": "energy of devices",
}
_MIB = float(1 << 20)


def cost_text(cost: Cost, value: float | None) -> str:
    """An amount with its unit; "-" where it is not known."""
    if value is None:
        return "-"
    if cost == "wall_s":
        return duration_text(value)
    if cost in ("sent_bytes", "upload_bytes"):
        return bytes_text(value)
    if cost == "energy_j":
        return f"{value:,.0f} J"
    return f"{round(value, 1):,g} s" if value < 100 else f"{value:,.0f} s"


def curve(figures: RunFigures, cost: Cost) -> str:
    """One picture; "" where less than two points have this cost, as one point is no curve."""
    known = [(point, used) for point in figures.points if (used := point.costs[cost]) is not None]
    if len(known) < 2:
        return ""
    unit = _MIB if cost in ("sent_bytes", "upload_bytes") else 1.0
    points, xs = [point for point, _ in known], [used / unit for _, used in known]
    values = [point.value for point in points]
    rising = figures.metric in SHARES
    lines = drawing.ticks(min(values), max(values))
    if rising:
        lines = [tick for tick in lines if tick <= 1.0 + 1e-9] or lines
    end = xs[-1] * 1.02 or 1.0
    at_x = drawing.scale(0.0, end, LEFT, WIDTH - RIGHT)
    at_y = drawing.scale(lines[0], max(lines[-1], max(values)), HEIGHT - BOTTOM, TOP)
    name = figures.metric.replace("_", " ")
    words = f"{name} by {COST_WORDS[cost]}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12" '
        f'role="img" aria-label="{safe(words)}">',
        drawing.style({"accent": drawing.ACCENT}),
        label(LEFT, 16, words, kind="ink", size=13, bold=True),
    ]
    for tick in lines:
        y = at_y(tick)
        parts.append(f'<line class="grid" stroke="{drawing.GRID}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(label(LEFT - 7, y + 4, f"{tick:.4g}" if not rising else f"{tick * 100:.4g} %", anchor="end"))
    for tick in drawing.time_ticks(end, 6) if cost == "wall_s" else [tick for tick in drawing.ticks(0.0, end) if tick <= end]:
        words = drawing.time_text(tick, end) if cost == "wall_s" else f"{tick:,g}"
        parts.append(label(at_x(tick), HEIGHT - BOTTOM + 18, words, anchor="middle"))
    if cost != "wall_s":
        parts.append(label(WIDTH - RIGHT, HEIGHT - 6, _unit(cost), anchor="end"))
    parts += _line(points, xs, figures, at_x, at_y)
    return "\n".join([*parts, "</svg>", ""])


def _unit(cost: Cost) -> str:
    return {"sent_bytes": "MiB", "upload_bytes": "MiB", "energy_j": "J"}.get(cost, "s")


def _line(points: list[Point], xs: list[float], figures: RunFigures, at_x: drawing.Scale, at_y: drawing.Scale) -> list[str]:
    steps: list[str] = []
    best = best_until(points, figures.lower_is_better)
    for index, (x, value) in enumerate(zip(xs, best, strict=True)):
        if index:
            steps.append(f"{at_x(x):.1f},{at_y(best[index - 1]):.1f}")  # a quality holds until the next commit
        steps.append(f"{at_x(x):.1f},{at_y(value):.1f}")
    colour = drawing.ACCENT.light
    parts = [f'<polyline class="accent-line" points="{" ".join(steps)}" fill="none" stroke="{colour}" stroke-width="2"/>']
    radius = 3.2 if len(points) <= 60 else 1.8
    for point, x in zip(points, xs, strict=True):
        when = f"round {point.round_number}" if point.round_number else "before the first round"
        tip = f"{when}: {metric_text(figures.metric, point.value)}"
        dot = f'<circle class="accent" fill="{colour}" cx="{at_x(x):.1f}" cy="{at_y(point.value):.1f}" r="{radius}"/>'
        parts.append(f"<g><title>{safe(tip)}</title>{dot}</g>")
    return parts
