"""What `vcgencmd` of a Raspberry Pi says."""

from __future__ import annotations

import re
import subprocess

_BITS = {
    0: "under-voltage now",
    1: "clock capped now",
    2: "throttled now",
    3: "soft temperature limit now",
    16: "under-voltage since the start",
    17: "clock was capped since the start",
    18: "throttled since the start",
    19: "soft temperature limit since the start",
}
_PMIC = re.compile(r"^\s*(?P<rail>\w+?)_(?P<kind>[AV])\s+(?:current|volt)\(\d+\)=(?P<value>[0-9.]+)[AV]\s*$")


def ask(*words: str) -> str:
    """Output of `vcgencmd WORDS`; empty where there is none or it fails."""
    try:
        done = subprocess.run(["vcgencmd", *words], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def throttled(text: str) -> tuple[str, ...] | None:
    """What `get_throttled` complains of, as words; None where the text is not its answer.

    >>> throttled("throttled=0x50005")
    ('under-voltage now', 'throttled now', 'under-voltage since the start', 'throttled since the start')
    """
    match = re.fullmatch(r"throttled=(0x[0-9a-fA-F]+)\s*", text)
    if match is None:
        return None
    flags = int(match[1], 16)
    return tuple(words for bit, words in _BITS.items() if flags >> bit & 1)


def pmic_watts(text: str) -> float | None:
    """Sum of volts times amperes over the rails that `pmic_read_adc` (Pi 5) shows both of; None where it shows none.

    What the board gives to USB and to other things on its 5 V input does not pass these rails.
    """
    readings: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        match = _PMIC.match(line)
        if match is not None:
            try:
                readings.setdefault(match["rail"], {})[match["kind"]] = float(match["value"])
            except ValueError:
                continue
    powers = [found["A"] * found["V"] for found in readings.values() if found.keys() == {"A", "V"}]
    return sum(powers) if powers else None
