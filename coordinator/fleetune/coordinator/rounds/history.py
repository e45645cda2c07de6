"""The committed rounds of a job as far as memory holds them: sums over all, and the records of those that something still asks for."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator

from fleetune.coordinator.domain import RoundEntry

RECENT_ROUNDS = 4
"""Records kept beside those of the rounds whose adapter is kept."""

TIMED_ROUNDS = 10
"""Rounds whose length tells how long the rest of the job will take."""


class History:
    """Written only by the engine, on the event loop.

    The simple version, a list of all records, grows by a record a round for as long as the job runs, some hundred bytes for each device in
    it. What is left out here is in the database (`records.load_rounds`).
    """

    def __init__(self) -> None:
        self.committed = 0
        """The last round's number, and how many there are."""
        self.upload_bytes = 0
        self.download_bytes = 0
        """Of all committed rounds."""
        self._records: dict[int, RoundEntry] = {}
        self._seconds: deque[float] = deque(maxlen=TIMED_ROUNDS)

    @classmethod
    def of(cls, entries: Iterable[RoundEntry], kept: Collection[int] = ()) -> History:
        """The history that these rounds make, from the first on; those whose adapter is kept stay in memory."""
        history = cls()
        for entry in entries:
            history.add(entry, kept)
        return history

    def add(self, entry: RoundEntry, kept: Collection[int]) -> None:
        """Note a committed round. `kept` are the rounds whose adapter is kept as of now."""
        self.committed = entry.number
        self.upload_bytes += entry.upload_bytes()
        self.download_bytes += entry.download_bytes()
        self._seconds.append(entry.ended_unix_s - entry.working_since_unix_s)
        self._records[entry.number] = entry
        for number in [n for n in self._records if n <= entry.number - RECENT_ROUNDS and n not in kept]:
            del self._records[number]

    def get(self, number: int) -> RoundEntry | None:
        """The record of a round, where memory still holds it."""
        return self._records.get(number)

    @property
    def last(self) -> RoundEntry | None:
        return self._records.get(self.committed)

    @property
    def median_s(self) -> float | None:
        """How long the last rounds took, seconds; None before the first."""
        return sorted(self._seconds)[len(self._seconds) // 2] if self._seconds else None

    def __iter__(self) -> Iterator[RoundEntry]:
        """The records in memory, oldest first."""
        return iter([self._records[number] for number in sorted(self._records)])

    def __len__(self) -> int:
        """How many records memory holds."""
        return len(self._records)
