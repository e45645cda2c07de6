"""Plain JSON values looked into without trust: what is not of the wanted sort counts as absent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast


def table(value: object) -> Mapping[str, object]:
    """The value as an object; an empty one for anything else."""
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else {}


def items(value: object) -> Sequence[object]:
    """The items of a list; none for anything else."""
    return cast("list[object]", value) if isinstance(value, list) else []


def tables(value: object) -> Sequence[Mapping[str, object]]:
    """The objects of a list, without its other items; none for anything else."""
    return [table(item) for item in items(value) if table(item) or item == {}]


def number(value: object) -> float | None:
    """A finite number as a float; None for anything else, booleans included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def count(value: object) -> int:
    """A number as a count; 0 for anything else."""
    found = number(value)
    return int(found) if found is not None else 0


def text(value: object) -> str:
    """A text as it is; "" for anything else."""
    return value if isinstance(value, str) else ""


def named(items: object, key: str, name: str) -> Mapping[str, object]:
    """The first object of a list whose `key` is `name`; an empty one where there is none."""
    for item in tables(items):
        if item.get(key) == name:
            return item
    return {}
