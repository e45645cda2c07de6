"""What the link to the coordinator carries: learned from real transfers and one short probe, kept on disk with its age."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fleetune.agent.probe.traffic import Goodput, RoundTrip
from fleetune.v1 import messages_pb2

FILE_NAME = "link.json"
FILE_BYTES_MAX = 64 << 10
VERSION = 1

FRESH_S = 86_400.0
"""Figures younger than this spare a device that connects again its probe."""

SAVE_S = 60.0
"""Between two writes: a board's card should not be written to with each transfer."""

PACED_PART = 0.5
"""Of its rate; a paced upload that stayed below has met something slower."""

FALL = 0.25
"""Of the known rate, at which a transfer counts although its time holds more than sending."""

CHANGE_MIN = 0.05
"""A smaller change of a figure is not told."""


@dataclass(frozen=True)
class Configured:
    """The owner's word, in bits a second; 0 is measured."""

    up_bits_per_s: float = 0.0
    down_bits_per_s: float = 0.0


class LinkFigures:
    """One device's link to one coordinator. Owned by the daemon; `clock` gives seconds since 1970."""

    def __init__(
        self, folder: Path, coordinator: str, configured: Configured = Configured(), clock: Callable[[], float] = time.time
    ) -> None:
        self._path = folder / FILE_NAME
        self._coordinator = coordinator
        self._configured = configured
        self._clock = clock
        self._up, self._down, self._trip = Goodput(), Goodput(), RoundTrip()
        self._up_unix_s = self._down_unix_s = 0.0
        self._recalled_trip_s = 0.0
        self._changed = False
        self._saved_unix_s = 0.0
        self.metered = False

    def sent(self, size_bytes: int, seconds: float, limit_bytes_per_s: float = math.inf, at_least: bool = False) -> None:
        """An upload has ended; as `Goodput.add`. One that kept to its rate tells the rate, not the link."""
        if math.isfinite(limit_bytes_per_s) and size_bytes > PACED_PART * limit_bytes_per_s * seconds:
            return
        if self._up.add(size_bytes, seconds, limit_bytes_per_s, at_least=at_least and not _far_below(self._up, size_bytes, seconds)):
            self._up_unix_s, self._changed = self._clock(), True

    def fetched(self, size_bytes: int, seconds: float, limit_bytes_per_s: float = math.inf, at_least: bool = False) -> None:
        """A download has ended; as `Goodput.add`."""
        if self._down.add(size_bytes, seconds, limit_bytes_per_s, at_least=at_least and not _far_below(self._down, size_bytes, seconds)):
            self._down_unix_s, self._changed = self._clock(), True

    def answered(self, seconds: float) -> None:
        """A heartbeat was answered after so long."""
        self._trip.add(seconds)

    def wants_probe(self) -> bool:
        """Whether the way up is worth a few hundred kilobytes: not where somebody pays for them, and not where it is known."""
        if self.metered or self._configured.up_bits_per_s > 0:
            return False
        return self._up.bytes_per_s is None or not 0 <= self._clock() - self._up_unix_s <= FRESH_S

    def message(self) -> messages_pb2.Link:
        """What is known now."""
        up, down = self._configured.up_bits_per_s, self._configured.down_bits_per_s
        at_unix_s = self._up_unix_s or self._down_unix_s
        trip_s = self._trip.least_s
        return messages_pb2.Link(
            up_bits_per_s=up or 8 * (self._up.bytes_per_s or 0.0),
            down_bits_per_s=down or 8 * (self._down.bytes_per_s or 0.0),
            round_trip_s=self._recalled_trip_s if trip_s is None else trip_s,
            source="configured" if up or down else "measured" if at_unix_s else "",
            age_s=0.0 if up or not at_unix_s else max(0.0, self._clock() - at_unix_s),
            metered=self.metered,
        )

    def recall(self) -> None:
        """Takes up what an earlier process has learned of this coordinator. A file that cannot be used is left out."""
        found = stored(self._path.parent)
        if found is None or found.coordinator != self._coordinator:
            return
        self._up.recall(found.up_bits_per_s / 8)
        self._down.recall(found.down_bits_per_s / 8)
        self._up_unix_s, self._down_unix_s, self._recalled_trip_s = found.up_unix_s, found.down_unix_s, found.round_trip_s

    def due(self) -> str | None:
        """The document to write now; None where nothing has changed, or something was written a moment ago."""
        now = self._clock()
        if not self._changed or 0 <= now - self._saved_unix_s < SAVE_S:
            return None
        self._changed, self._saved_unix_s = False, now
        trip_s = self._trip.least_s
        return json.dumps(
            {
                "version": VERSION,
                "coordinator": self._coordinator,
                "up_bits_per_s": 8 * (self._up.bytes_per_s or 0.0),
                "up_unix_s": self._up_unix_s,
                "down_bits_per_s": 8 * (self._down.bytes_per_s or 0.0),
                "down_unix_s": self._down_unix_s,
                "round_trip_s": self._recalled_trip_s if trip_s is None else trip_s,
            },
            indent=1,
            allow_nan=False,
        )

    def write(self, document: str) -> None:
        """Aside and renamed, without a flush: what a power cut takes is measured again. OSError where the disk is full."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            aside.write_text(document, "utf-8")
            aside.replace(self._path)
        finally:
            aside.unlink(missing_ok=True)


def _far_below(known: Goodput, size_bytes: int, seconds: float) -> bool:
    """Whether the link has become another, whatever else the seconds hold."""
    return known.bytes_per_s is not None and size_bytes < FALL * known.bytes_per_s * seconds


def differs(told: messages_pb2.Link | None, now: messages_pb2.Link) -> bool:
    """Whether the coordinator should hear of it. Ages and small changes are no news."""
    if told is None:
        return True
    if (told.source, told.metered) != (now.source, now.metered):
        return True
    pairs = (
        (told.up_bits_per_s, now.up_bits_per_s),
        (told.down_bits_per_s, now.down_bits_per_s),
        (told.round_trip_s, now.round_trip_s),
    )
    return any(abs(new - old) > CHANGE_MIN * old for old, new in pairs)


@dataclass(frozen=True)
class Stored:
    """What lies on disk; 0 where nothing was known."""

    coordinator: str
    up_bits_per_s: float
    up_unix_s: float
    down_bits_per_s: float
    down_unix_s: float
    round_trip_s: float


def stored(folder: Path) -> Stored | None:
    """The figures on disk; None where there are none or the file cannot be used."""
    try:
        with (folder / FILE_NAME).open("rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
        document: object = json.loads(text) if len(text) <= FILE_BYTES_MAX else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    fields = cast("dict[str, object]", document)
    if fields.get("version") != VERSION or not isinstance(fields.get("coordinator"), str):
        return None
    names = ("up_bits_per_s", "up_unix_s", "down_bits_per_s", "down_unix_s", "round_trip_s")
    numbers = [fields.get(name) for name in names]
    known = [float(n) for n in numbers if isinstance(n, (int, float)) and math.isfinite(n) and n >= 0]
    return Stored(str(fields["coordinator"]), *known) if len(known) == len(names) else None
