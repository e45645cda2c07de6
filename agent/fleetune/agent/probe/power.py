"""Whether the machine runs on mains power."""

from __future__ import annotations

from pathlib import Path

import psutil


def on_mains(root: Path = Path("/")) -> bool | None:
    """True on mains (or without any battery), False on battery, None where nothing tells."""
    folder = root / "sys/class/power_supply"
    if folder.is_dir():
        return _from_supplies(folder)
    sensors_battery = getattr(psutil, "sensors_battery", None)
    if sensors_battery is None:
        return None
    battery = sensors_battery()
    if battery is None:
        return True
    plugged = battery.power_plugged
    return None if plugged is None else bool(plugged)


def _from_supplies(folder: Path) -> bool | None:
    statuses: list[str] = []
    plugged = False
    for supply in sorted(folder.iterdir()):
        # The battery of a mouse or a headset powers that thing, not this machine.
        if _word(supply / "scope") == "Device":
            continue
        if _word(supply / "type") == "Battery":
            statuses.append(_word(supply / "status"))
        elif _word(supply / "online") not in ("", "0"):
            plugged = True
    if plugged or not statuses:
        return True
    if "Discharging" in statuses:
        return False
    return True if any(status in ("Charging", "Full", "Not charging") for status in statuses) else None


def _word(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
