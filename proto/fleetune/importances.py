"""Importance of a model's heads and neurons as a device tells it: a byte for each unit, the most important of each group at 255."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from fleetune.architectures import Layout
from fleetune.errors import WireError

UNITS_MAX = 1 << 16
"""Of a model whose devices tell it: it is stored with the round. Of larger ones what devices have kept is all that is known."""

Scores = Sequence[Sequence[float]]
"""For each group a number for each unit of the unpruned model."""


def is_told(layout: Layout) -> bool:
    """Whether devices tell importance of such a model."""
    return units(layout) <= UNITS_MAX


def units(layout: Layout) -> int:
    return sum(group.units for group in layout.groups)


def to_text(scores: Scores) -> str:
    """Base64 of the bytes, group after group."""
    data = bytearray()
    for group in scores:
        most = max(group, default=0.0)
        data += bytes(round(255 * min(1.0, max(0.0, value / most))) if most > 0 else 0 for value in group)
    return base64.b64encode(data).decode("ascii")


def from_text(layout: Layout, text: str) -> list[list[float]]:
    """0 to 1 for each unit of each group. WireError for what is not of this layout."""
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
        found.append([value / 255 for value in data[place : place + group.units]])
        place += group.units
    return found
