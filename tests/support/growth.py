"""Counts what the structures of a running program hold, so that a test can see which of them grow."""

from __future__ import annotations

from collections import Counter, deque


def held(roots: dict[str, object]) -> Counter[str]:
    """Place ("engine.jobs[].progress") -> elements in the containers there, followed through the program's own objects."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = list(roots.items())
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, (str, bytes, int, float, type(None))) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            found[place] += len(value)
            waiting += [(f"{place}[]", item) for item in value.values()]
        elif isinstance(value, (list, set, frozenset, tuple, deque)):
            found[place] += len(value)
            waiting += [(f"{place}[]", item) for item in value]
        elif type(value).__module__.startswith("fleetune.") and not isinstance(value, type):
            names = getattr(value, "__dict__", None)
            members = names if names is not None else {name: getattr(value, name, None) for name in getattr(value, "__slots__", ())}
            waiting += [(f"{place}.{name}", item) for name, item in members.items()]
    return found


def grown(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    """Places that hold more than before."""
    return {place: (before[place], after[place]) for place in sorted(after) if after[place] > before[place]}
