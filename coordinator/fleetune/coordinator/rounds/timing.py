"""When a device's part of a planned round can be ready, whether it fits, and what it sends: plain arithmetic on what devices have told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fleetune.coordinator.domain import Candidate, DepthBlock, DeviceFigures, LinkFigures, PlannedPart, PlanSettings

TENSOR_BITS = 8 * 160
"""What a tensor adds to an update beside its numbers: its entry in the header, which holds its name."""

UNKNOWN_UP_BITS_PER_S = 10e6
"""Taken for the uplink of a device where no device of the round knows its own."""

NEWEST_WEIGHT = 0.3
"""Of the newest round in the moving average of a device's lateness."""

FAR_OFF = 2.0
"""Twice in a row ready only after so many times what its figures say: they are wrong, and the average would take long to come there."""


def payload_bits(block: DepthBlock, settings: PlanSettings) -> float:
    """Bits on the wire of the update of one depth."""
    return float(block.values * settings.value_bits + len(block.tensors) * TENSOR_BITS)


def groups(blocks: Sequence[DepthBlock], layers: int) -> tuple[tuple[int, ...], ...]:
    """Depths (from 1) that are planned as one, in depth order: `layers` neighbours each, and the head by itself."""
    depths = list(range(1, len(blocks) + 1))
    found: list[tuple[int, ...]] = []
    if blocks and blocks[0].name == "head":
        found.append((1,))
        del depths[0]
    found += [tuple(depths[at : at + layers]) for at in range(0, len(depths), max(1, layers))]
    return tuple(found)


def download_s(link: LinkFigures, state_bytes: int) -> float:
    """Seconds until the round's state is there; nothing is known of a link that was never used."""
    fetching_s = state_bytes * 8 / link.down_bits_per_s if link.down_bits_per_s > 0 else 0.0
    return fetching_s + link.round_trip_s


def step_scale(figures: DeviceFigures, settings: PlanSettings) -> float:
    """What a task costs in units of the measured step, cautiously: passes, rows, and the margin that nine rounds in ten keep."""
    rows = settings.rows / figures.batch_rows if figures.batch_rows > 0 else 1.0
    return settings.passes * rows * max(figures.margin, 1.0)


def ready_s(
    figures: DeviceFigures, link: LinkFigures, deepest: int, settings: PlanSettings, state_bytes: int, extra_s: float = 0.0
) -> float:
    """Seconds from the round's training start until the upload can begin, for a task whose deepest trained depth is `deepest`."""
    return download_s(link, state_bytes) + figures.step_s[deepest - 1] * step_scale(figures, settings) + extra_s


def fits(figures: DeviceFigures, deepest: int) -> bool:
    """Whether a step down to `deepest` fits beside the loaded model into what its process may take."""
    return figures.room_bytes == 0 or figures.loaded_bytes + figures.step_bytes[deepest - 1] <= figures.room_bytes


def short_of(figures: DeviceFigures, failed: int) -> DeviceFigures:
    """The figures of a device whose memory was not enough for depth `failed` and will not be for deeper ones; 0: it always was."""
    if not failed:
        return figures
    held = figures.step_bytes[failed - 2] if failed > 1 else 0
    room = figures.room_bytes or figures.loaded_bytes + held
    too_much = max(room - figures.loaded_bytes, 0) + 1
    sizes = (size if depth < failed else max(size, too_much) for depth, size in enumerate(figures.step_bytes, 1))
    return replace(figures, room_bytes=max(room, 1), step_bytes=tuple(sizes))


def up_rates(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Device id -> the uplink to plan with, bit/s: its own, or the median of those that are known."""
    known = sorted(c.link.up_bits_per_s for c in candidates if c.link.up_bits_per_s > 0)
    usual = known[len(known) // 2] if known else UNKNOWN_UP_BITS_PER_S
    return {c.device_id: c.link.up_bits_per_s if c.link.up_bits_per_s > 0 else usual for c in candidates}


def later_by(before_s: float, planned_ready_s: float, seen_ready_s: float) -> float:
    """The moving average of how much later than its figures say a device's uploads begin; `before_s` was in the plan already.

    The newest alone where it is the second in a row that is far off: one may be a stall.
    """
    if seen_ready_s <= 0:  # not seen, as after a restart
        return before_s
    told_s = planned_ready_s - before_s
    late_s, far_s = seen_ready_s - told_s, (FAR_OFF - 1.0) * told_s
    if late_s >= far_s and before_s >= NEWEST_WEIGHT * far_s:
        return late_s
    return max(0.0, (1 - NEWEST_WEIGHT) * before_s + NEWEST_WEIGHT * late_s)


def taken_over(
    part: PlannedPart,
    candidates: Sequence[Candidate],
    figures: dict[str, DeviceFigures],
    extra_s: dict[str, float],
    bits: float,
    settings: PlanSettings,
    state_bytes: int,
    elapsed_s: float,
    until_s: float,
) -> PlannedPart | None:
    """The part as the candidate would do it that is done soonest, begun `elapsed_s` after the round's training start.

    None where nobody is done by `until_s` (0: whenever that may be). It gets the rate of the part, or its own where that is less. `bits`
    are those of the whole part. Ties go by device id.
    """
    rates = up_rates(candidates)
    deepest = part.depths[-1]
    best: PlannedPart | None = None
    for candidate in sorted(candidates, key=lambda c: c.device_id):
        own = figures.get(candidate.device_id)
        if own is None or len(own.step_s) < deepest or not fits(own, deepest):
            continue
        rate = rates[candidate.device_id]
        bound = min(part.uplink_bits_per_s, rate) if part.uplink_bits_per_s > 0 else 0.0
        ready = elapsed_s + ready_s(own, candidate.link, deepest, settings, state_bytes, extra_s.get(candidate.device_id, 0.0))
        finish = ready + bits / (bound or rate)
        if until_s > 0 and finish > until_s:
            continue
        if best is None or finish < best.finish_s:
            best = PlannedPart(candidate.device_id, part.depths, part.share, bound, ready, finish)
    return best
