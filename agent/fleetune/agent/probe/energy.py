"""What the machine's own sensors say of power and energy: readings or none, never a guess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fleetune.agent.probe import raspberry

_INA_TOTAL = ("VDD_IN", "POM_5V_IN", "VDD_TOTAL", "SYS_VIN_HV", "VIN_SYS_5V0")
"""Labels of the rail that carries the whole board, by board family; the others are parts of it."""


@dataclass(frozen=True)
class Counter:
    """An energy counter that only grows, and begins at 0 again after `range_uj`."""

    name: str
    energy_uj: int
    range_uj: int


@dataclass(frozen=True)
class Power:
    """Watts now, of what, and from which sensor."""

    watts: float
    scope: str
    source: str


def rapl(root: Path = Path("/")) -> list[Counter]:
    """Energy counters of the processor packages; none where there are none, or where only root may read them (most kernels)."""
    counters: list[Counter] = []
    for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        # intel-rapl:0 is a package; intel-rapl:0:1 is a part of it and would count twice.
        if folder.name.count(":") != 1:
            continue
        energy_uj, range_uj = _number(folder / "energy_uj"), _number(folder / "max_energy_range_uj")
        if energy_uj is not None and range_uj is not None and range_uj > 0:
            counters.append(Counter(f"{folder.name} {_text(folder / 'name')}".strip(), energy_uj, range_uj))
    return counters


def joules(before: list[Counter], after: list[Counter]) -> float | None:
    """Energy between two readings of `rapl`, over all packages; None where they do not show the same counters."""
    if not before or [counter.name for counter in before] != [counter.name for counter in after]:
        return None
    return sum((late.energy_uj - early.energy_uj) % late.range_uj for early, late in zip(before, after, strict=True)) / 1e6


def power(root: Path = Path("/"), pmic_text: str | None = None) -> Power | None:
    """The board's power now from an INA3221 (Jetson) or the power chip of a Raspberry Pi 5 (`pmic_text`: else it is asked)."""
    watts = _ina_watts(root)
    if watts is not None:
        return Power(watts, "board", "ina3221")
    if pmic_text is None:
        pmic_text = raspberry.ask("pmic_read_adc") if (root / "dev/vcio").exists() else ""
    watts = raspberry.pmic_watts(pmic_text)
    return None if watts is None else Power(watts, "board without its 5 V outputs", "pmic")


def _ina_watts(root: Path) -> float | None:
    rails: dict[str, float] = {}
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        if _text(folder / "name") == "ina3221":
            rails |= _hwmon_rails(folder)
    for folder in sorted((root / "sys/bus/i2c/drivers/ina3221x").glob("*/iio:device*")):
        rails |= _iio_rails(folder)
    return next((rails[label] for label in _INA_TOTAL if label in rails), None)


def _hwmon_rails(folder: Path) -> dict[str, float]:
    """JetPack 5 and later: millivolts and milliamperes of each channel."""
    rails: dict[str, float] = {}
    for channel in (1, 2, 3):
        label = _text(folder / f"in{channel}_label")
        millivolts, milliamperes = _number(folder / f"in{channel}_input"), _number(folder / f"curr{channel}_input")
        if label and millivolts is not None and milliamperes is not None:
            rails[label] = millivolts * milliamperes / 1e6
    return rails


def _iio_rails(folder: Path) -> dict[str, float]:
    """JetPack 4: milliwatts of each channel."""
    rails: dict[str, float] = {}
    for channel in (0, 1, 2):
        label, milliwatts = _text(folder / f"rail_name_{channel}"), _number(folder / f"in_power{channel}_input")
        if label and milliwatts is not None:
            rails[label] = milliwatts / 1e3
    return rails


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isascii() and text.isdigit() else None
