"""Whether the device's owner lets it train now, and how long a model may stay loaded: decided from facts alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, time

from fleetune.errors import ConfigError

WARM_MEMORY_BYTES_MIN = 1792 * 1024**2
"""A "2 GiB" board shows the system about 1.8 GiB; smaller ones need the memory for everything else."""

WARM_AVAILABLE_FRACTION_MIN = 0.15
"""Below this part of free memory a loaded model is let go at once."""

_HOURS = re.compile(r"(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})", re.ASCII)


class HoursError(ConfigError):
    """A text that is no time window; `allowed` says what is."""

    allowed = 'windows such as "22:00-06:00", from 00:00 to 24:00'

    def __init__(self, text: str) -> None:
        super().__init__(f"The hours {text!r} are no time window.", f"Allowed: {self.allowed}.")


@dataclass(frozen=True)
class Window:
    """From `start` until before `end`, local time; over midnight where the end comes first. Equal ends are the whole day."""

    start: time
    end: time
    text: str

    def holds(self, moment: time) -> bool:
        moment = moment.replace(tzinfo=None)
        if self.start < self.end:
            return self.start <= moment < self.end
        return moment >= self.start or moment < self.end


@dataclass(frozen=True)
class Limits:
    """What the owner wants. `hours` empty is always; interface names may hold `*`."""

    on_mains_only: bool = False
    idle_only: bool = False
    idle_cpu_percent: float = 20.0
    hours: tuple[Window, ...] = ()
    allow_metered: bool = False
    metered_interfaces: tuple[str, ...] = ("wwan*", "ppp*", "rmnet*")


@dataclass(frozen=True)
class Facts:
    """What the probes say now; None is "cannot be read" (or, for the load, "not measured long enough yet")."""

    on_mains: bool | None = None
    others_cpu_percent: float | None = None
    interfaces: Sequence[str] = field(default_factory=tuple)
    # The owner's own word for the link, whatever it runs over.
    declared_metered: bool = False


def availability(limits: Limits, facts: Facts, now_local: datetime) -> tuple[bool, str]:
    """Whether the device takes tasks now, and if not, why, for a person.

    An owner's wish that cannot be checked is not granted: a laptop whose battery cannot be read does not train "on mains only".
    """
    reasons = [
        reason for reason in (_hours(limits, now_local), _mains(limits, facts), _metered(limits, facts), _idle(limits, facts)) if reason
    ]
    return not reasons, "; ".join(reasons)


def hours_window(text: str) -> Window:
    """The window that "22:00-06:00" means. Raises HoursError."""
    match = _HOURS.fullmatch(text.strip())
    if match is None:
        raise HoursError(text)
    numbers = [int(group) for group in match.groups()]
    for hour, minute in (numbers[:2], numbers[2:]):
        if minute > 59 or hour > 24 or (hour == 24 and minute):
            raise HoursError(text)
    # 24:00 is the midnight that ends the day, which as a time is 00:00.
    start, end = (time(hour % 24, minute) for hour, minute in (numbers[:2], numbers[2:]))
    return Window(start, end, text.strip())


def keep_warm_s(configured_s: float, task_s: float, memory_total_bytes: int, memory_available_bytes: int) -> float:
    """How long the training child may stay loaded after a task: the shorter of both wishes, and not at all where memory is short."""
    small = memory_total_bytes < WARM_MEMORY_BYTES_MIN
    pressed = memory_available_bytes < memory_total_bytes * WARM_AVAILABLE_FRACTION_MIN
    return 0.0 if small or pressed else min(configured_s, task_s)


def metered_among(limits: Limits, interfaces: Sequence[str]) -> list[str]:
    """Those of the interfaces that are paid by volume."""
    return sorted(name for name in interfaces if any(fnmatch.fnmatchcase(name, pattern) for pattern in limits.metered_interfaces))


def _hours(limits: Limits, now_local: datetime) -> str:
    if not limits.hours or any(window.holds(now_local.time()) for window in limits.hours):
        return ""
    return "outside " + ", ".join(window.text for window in limits.hours)


def _mains(limits: Limits, facts: Facts) -> str:
    if not limits.on_mains_only or facts.on_mains is True:
        return ""
    return "on battery" if facts.on_mains is False else "power supply cannot be read"


def _metered(limits: Limits, facts: Facts) -> str:
    if limits.allow_metered:
        return ""
    metered = metered_among(limits, facts.interfaces)
    if metered:
        return f"metered link ({', '.join(metered)})"
    return "metered link (as configured)" if facts.declared_metered else ""


def _idle(limits: Limits, facts: Facts) -> str:
    if not limits.idle_only:
        return ""
    if facts.others_cpu_percent is None:
        return "load not measured yet"
    if facts.others_cpu_percent > limits.idle_cpu_percent:
        return f"in use ({facts.others_cpu_percent:.0f} % load by others)"
    return ""
