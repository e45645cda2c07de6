"""How hot the machine is."""

from __future__ import annotations

from pathlib import Path

_SENSORS = ("sys/class/thermal/thermal_zone*/temp", "sys/class/hwmon/hwmon*/temp*_input")

PLAUSIBLE_C = (-40.0, 150.0)
"""Sensors that are switched off tell -256 or 127.9 times something."""


def hottest_c(root: Path = Path("/")) -> float | None:
    """The hottest sensor in degrees Celsius; None where none is readable (always so on macOS)."""
    readings = [reading for pattern in _SENSORS for path in root.glob(pattern) if (reading := _reading_c(path)) is not None]
    return max(readings, default=None)


def _reading_c(path: Path) -> float | None:
    """sysfs counts in thousandths. A sensor whose driver sleeps answers with an error."""
    try:
        reading = int(path.read_text("ascii")) / 1000
    except (OSError, ValueError):
        return None
    return reading if PLAUSIBLE_C[0] < reading < PLAUSIBLE_C[1] and reading != 0 else None
