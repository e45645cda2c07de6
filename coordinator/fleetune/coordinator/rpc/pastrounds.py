"""The committed rounds of a job as an answer holds them: read from the database a few at a time, and cut to the room there is."""

from __future__ import annotations

from fleetune.coordinator.rounds.job import LiveJob
from fleetune.coordinator.rpc import convert
from fleetune.coordinator.store import records
from fleetune.coordinator.store.db import Database
from fleetune.v1 import control_pb2

ROUNDS_AT_ONCE = 50
"""Read in one turn of the database's reader, which others wait for, too."""

BETWEEN_ROUNDS_MAX = 200
"""Rounds that were committed since a watcher last heard of the job; one that missed more asks for the whole history."""

FRAME_BYTES = 8
"""What a round takes in an answer beside its own bytes."""


class Fitting:
    """Rounds as many as fit into `room_bytes`, taken from the newest back.

    What a round came to is some hundred bytes, what each of its devices did many times that: so older rounds lose their devices before any
    round is left out.
    """

    def __init__(self, room_bytes: int) -> None:
        self._room_bytes = room_bytes  # if all rounds so far came without their tasks
        self._tasks_bytes = 0
        self._with_tasks = 0  # of the newest rounds
        self._rounds: list[control_pb2.RoundView] = []  # newest first

    def add(self, view: control_pb2.RoundView) -> bool:
        """Take the round before those taken so far; False where it is left out, and all before it must be."""
        bare = control_pb2.RoundView()
        bare.CopyFrom(view)
        bare.ClearField("tasks")
        bare_bytes = bare.ByteSize() + FRAME_BYTES
        if bare_bytes > self._room_bytes:
            return False
        self._room_bytes -= bare_bytes
        tasks_bytes = view.ByteSize() + FRAME_BYTES - bare_bytes
        if self._with_tasks == len(self._rounds) and self._tasks_bytes + tasks_bytes <= self._room_bytes:
            self._rounds.append(view)
            self._with_tasks += 1
            self._tasks_bytes += tasks_bytes
        else:
            self._rounds.append(bare)
        while self._tasks_bytes > self._room_bytes:
            self._with_tasks -= 1
            oldest = self._rounds[self._with_tasks]
            self._tasks_bytes -= oldest.ByteSize()
            oldest.ClearField("tasks")
            self._tasks_bytes += oldest.ByteSize()
        return True

    @property
    def tasks_since_round(self) -> int:
        """The oldest round that has its tasks, or the one after the newest where none has; 0 where all have."""
        if self._with_tasks == len(self._rounds):
            return 0
        return self._rounds[self._with_tasks].round + 1

    def rounds(self) -> list[control_pb2.RoundView]:
        """Oldest first."""
        return self._rounds[::-1]


async def add_all(view: control_pb2.JobView, job: LiveJob, database: Database, online: frozenset[str]) -> None:
    """Give the job's view its history, as far as it fits."""
    fitting = Fitting(convert.ANSWER_BYTES_MAX - len(job.toml.encode()))
    fresh = {entry.number: convert.round_view(entry, job, online) for entry in job.history}
    last = view.rounds_committed
    while last > 0:
        first = max(1, last - ROUNDS_AT_ONCE + 1)
        found = await _between(job, database, online, first, last)
        found.update((number, fresh[number]) for number in fresh if first <= number <= last)
        if not all(fitting.add(found[number]) for number in sorted(found, reverse=True)):
            break
        last = first - 1
    view.history.extend(fitting.rounds())
    view.tasks_since_round = fitting.tasks_since_round


async def add_since(view: control_pb2.JobView, told: int, job: LiveJob, database: Database, online: frozenset[str]) -> None:
    """Give the job's view the rounds after round `told`, unless they are too many."""
    first, last = told + 1, view.rounds_committed
    if last - told > BETWEEN_ROUNDS_MAX:
        return
    fresh = {entry.number: convert.round_view(entry, job, online) for entry in job.history if first <= entry.number <= last}
    if len(fresh) < last - told:
        fresh = {**await _between(job, database, online, first, last), **fresh}
    fitting = Fitting(convert.ANSWER_BYTES_MAX)
    if all(fitting.add(fresh[number]) for number in sorted(fresh, reverse=True)):
        view.history.extend(fitting.rounds())


async def _between(job: LiveJob, database: Database, online: frozenset[str], first: int, last: int) -> dict[int, control_pb2.RoundView]:
    """Rounds of the database by number; the newest may not be there yet. Made into messages in its thread."""
    return await database.read(
        lambda c: {entry.number: convert.round_view(entry, job, online) for entry in records.load_rounds(c, job.job_id, first, last)}
    )
