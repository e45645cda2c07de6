"""Bytes, durations and measures as a person reads them."""

from __future__ import annotations

import math

_BYTE_UNITS = ("KiB", "MiB", "GiB", "TiB")


def bytes_text(count: float) -> str:
    """1536 -> "1.5 KiB"; three digits at most before the unit changes."""
    if count < 1000:
        return f"{int(count)} B"
    scaled = float(count)
    for unit in _BYTE_UNITS:
        scaled /= 1024
        if scaled < 9.95:
            return f"{scaled:.1f} {unit}"
        if scaled < 999.5:
            return f"{scaled:.0f} {unit}"
    return f"{scaled:.0f} {_BYTE_UNITS[-1]}"


def duration_text(seconds: float) -> str:
    """0.042 -> "42 ms", 7.3 -> "7.3 s", 134 -> "2m 14s", 7500 -> "2h 05m", 200000 -> "2d 07h"."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def rate_text(bits_per_s: float) -> str:
    """5.2e6 -> "5.2 Mbit/s", 800 -> "0.8 kbit/s"; "-" for 0, which is not known."""
    if not math.isfinite(bits_per_s) or bits_per_s <= 0:
        return "-"
    for unit, size in (("kbit/s", 1e3), ("Mbit/s", 1e6), ("Gbit/s", 1e9)):
        scaled = bits_per_s / size
        if scaled < 999.5 or unit == "Gbit/s":
            return f"{scaled:.1f} {unit}" if scaled < 9.95 else f"{scaled:.0f} {unit}"
    return "-"


def loss_text(value: float | None) -> str:
    """A loss in four significant places, "-" where there is none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"


def metric_text(name: str, value: float | None) -> str:
    """Shares ("accuracy", "macro_f1") as a percentage, anything else as a loss."""
    if value is None:
        return "-"
    if name in {"accuracy", "macro_f1"} and 0 <= value <= 1:
        return f"{value:.1%}"
    return loss_text(value)


def count_text(count: int, noun: str) -> str:
    """(1, "device") -> "1 device", (3, "device") -> "3 devices"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
