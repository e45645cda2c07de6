"""Importance of a model's heads and neurons as a device tells it: a byte for each unit.

A byte is 255 times the square root of a unit's importance beside SPAN times the mean of its group, which keeps apart the many that matter
little: they are those that may go. So devices whose gradients are of unlike size speak equally loud. What a device has cut is 0.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence

from fleetune.architectures import Layout
from fleetune.errors import WireError

UNITS_MAX = 1 << 16
"""Of a model whose devices tell it: it is stored with the round. Of larger ones what devices have kept is all that is known."""

SPAN = 16.0
"""Times the mean of its group: whatever matters more stays anyway."""

Scores = Sequence[Sequence[float]]
"""For each group a number for each unit of the unpruned model."""


def is_told(layout: Layout) -> bool:
    """Whether devices tell importance of such a model."""
    return units(layout) <= UNITS_MAX


def units(layout: Layout) -> int:
    return sum(group.units for group in layout.groups)


def to_text(scores: Scores) -> str:
    """Base64 of the bytes, group after group. The mean is that of the units that are above 0, all others having been cut."""
    data = bytearray()
    for group in scores:
        above = [value for value in group if value > 0]
        most = SPAN * math.fsum(above) / len(above) if above else math.inf
        data += bytes(round(255 * math.sqrt(min(1.0, value / most))) if value > 0 else 0 for value in group)
    return base64.b64encode(data).decode("ascii")


def from_text(layout: Layout, text: str) -> list[list[float]]:
    """For each unit of each group its importance, about 1 in the mean of what is left. WireError for what is not of this layout."""
    needed = units(layout)
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True) if len(text) <= 4 * (needed + 2) // 3 + 4 else b""
    except (ValueError, binascii.Error):
        data = b""
    if len(data) != needed:
        raise WireError(
            f"The importance of units is refused: {needed} bytes in base64 are needed, {text[:20]!r} is something else.",
            "Use the same version of Fleetune on both sides.",
        )
    found: list[list[float]] = []
    place = 0
    for group in layout.groups:
        found.append([SPAN * (value / 255) ** 2 for value in data[place : place + group.units]])
        place += group.units
    return found
