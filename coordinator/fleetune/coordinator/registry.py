"""Which devices are connected, under which name, and which of them may take a job's task now. Pure: `now` is an argument.

All times are of a monotonic clock, so that a jump of the wall clock ends no session.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from fleetune.coordinator.domain import Candidate, LinkFigures

RefusalKind = Literal["duplicate_id", "name_taken", "invalid"]

REFUSAL_PAUSE_S = 30.0
"""A device that refused a task is asked again after this, or as soon as it says that it accepts tasks."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What an agent says of itself when it connects."""

    device_id: str
    name: str
    instance_id: str
    tags: frozenset[str] = frozenset()
    data_names: frozenset[str] = frozenset()
    train_data_names: frozenset[str] = frozenset()
    """Of `data_names`, those with rows to train on."""
    validation_data_names: frozenset[str] = frozenset()
    """Of `data_names`, those with rows to measure on."""
    methods: frozenset[str] = frozenset()
    accepts_tasks: bool = True
    reason: str = ""
    address: str = ""
    link: LinkFigures = field(default_factory=LinkFigures)
    hardware: str = ""
    """Its class of hardware."""


@dataclass(slots=True)
class Session:
    """One live control stream. Written only by the registry."""

    session_id: int
    greeting: Greeting
    accepts_tasks: bool
    reason: str
    last_heard_s: float
    not_before_s: float = 0.0
    """No task before this time: it has just refused one, and would in a loop."""
    link: LinkFigures = field(default_factory=LinkFigures)
    """What its link carries, as it last told."""


@dataclass(frozen=True)
class Refused:
    """Why a session is not opened; `retry_after_s` 0 means that trying again does not help."""

    kind: RefusalKind
    message: str
    retry_after_s: float


@dataclass(frozen=True)
class Needs:
    """What a job asks of a device."""

    method: str
    data_name: str
    tags: frozenset[str]


@dataclass
class Registry:
    """Live sessions by device id. Written only by the fleet service and the engine, on the event loop."""

    lease_s: float
    names: dict[str, str] = field(default_factory=dict[str, str])
    """Device name -> device id, of every device ever seen."""
    quarantined: Mapping[str, str] = field(default_factory=dict[str, str])
    """Device id -> why it gets no tasks. Written by the roster, when an operator says so; a session changes nothing of it."""
    sessions: dict[str, Session] = field(default_factory=dict[str, Session])
    left_s: dict[str, float] = field(default_factory=dict[str, float])
    """Device id -> when it was last heard, of devices that were here since the start and are gone."""
    _next_session: int = 1

    def admit(self, greeting: Greeting, now_s: float) -> Session | Refused:
        """Open a session, replacing one of the same agent process; the second holder of an id or a name is refused by name."""
        current = self.sessions.get(greeting.device_id)
        if current is not None and current.greeting.instance_id != greeting.instance_id:
            silent_s = now_s - current.last_heard_s
            if silent_s < self.lease_s:
                return Refused(
                    "duplicate_id",
                    f"device id {greeting.device_id} is in use by {current.greeting.name!r} ({current.greeting.address}); "
                    f"{greeting.name!r} ({greeting.address}) has a copy of its id file. "
                    "Delete the id file in the state_dir of the copy and start it again.",
                    retry_after_s=max(1.0, self.lease_s - silent_s),
                )
        owner = self.names.get(greeting.name)
        if owner is not None and owner != greeting.device_id:
            return Refused(
                "name_taken",
                f"the name {greeting.name!r} belongs to another device (id {owner}); choose another one with --name.",
                retry_after_s=0.0,
            )
        for name in [n for n, device_id in self.names.items() if device_id == greeting.device_id]:
            del self.names[name]
        self.names[greeting.name] = greeting.device_id
        session = Session(self._next_session, greeting, greeting.accepts_tasks, greeting.reason, now_s, link=greeting.link)
        self._next_session += 1
        self.sessions[greeting.device_id] = session
        self.left_s.pop(greeting.device_id, None)
        return session

    def leave(self, session: Session) -> bool:
        """End `session`; False where a newer one of the same device has taken its place."""
        if self.sessions.get(session.greeting.device_id) is not session:
            return False
        del self.sessions[session.greeting.device_id]
        self.left_s[session.greeting.device_id] = session.last_heard_s
        return True

    def announce(self, session: Session, accepts_tasks: bool, reason: str) -> None:
        """The device's own word about whether it takes tasks; it ends the pause after a refusal."""
        session.accepts_tasks, session.reason, session.not_before_s = accepts_tasks, reason, 0.0

    def refused(self, session: Session, reason: str, now_s: float) -> None:
        """The device refused a task: it is left alone for a while."""
        session.reason, session.not_before_s = reason, now_s + REFUSAL_PAUSE_S

    def next_return_s(self, now_s: float) -> float | None:
        """When the next device may be asked again after a refusal."""
        return min((s.not_before_s for s in self.sessions.values() if s.accepts_tasks and s.not_before_s > now_s), default=None)

    def candidates(self, needs: Needs, busy: Collection[str], now_s: float) -> tuple[Candidate, ...]:
        """Devices that are connected, willing, free and able to do `needs`."""
        return tuple(
            Candidate(
                s.greeting.device_id, s.greeting.name, trains(s.greeting, needs), evaluates(s.greeting, needs), s.link, s.greeting.hardware
            )
            for s in self.sessions.values()
            if s.accepts_tasks
            and s.not_before_s <= now_s
            and s.greeting.device_id not in busy
            and s.greeting.device_id not in self.quarantined
            and not lacks(s.greeting, needs)
        )

    def explain(self, needs: Needs, busy: Collection[str], now_s: float) -> dict[str, str]:
        """Device name -> why it may not take the job's train task now."""
        reasons: dict[str, str] = {}
        for session in self.sessions.values():
            greeting = session.greeting
            if greeting.device_id in self.quarantined:
                reasons[greeting.name] = f"in quarantine: {self.quarantined[greeting.device_id]}"
            elif missing := lacks(greeting, needs):
                reasons[greeting.name] = missing
            elif not trains(greeting, needs):
                reasons[greeting.name] = f"it has only validation rows of {needs.data_name!r}"
            elif not session.accepts_tasks or session.not_before_s > now_s:
                reasons[greeting.name] = session.reason or "its owner's limits forbid it now"
            elif greeting.device_id in busy:
                reasons[greeting.name] = "works on another task"
        return reasons


def lacks(greeting: Greeting, needs: Needs) -> str:
    """What the device lacks for `needs`, or an empty string."""
    if needs.method not in greeting.methods:
        return f"its agent does not know method {needs.method!r}"
    if needs.data_name and needs.data_name not in greeting.data_names:
        return f"it has no data named {needs.data_name!r}"
    if missing := needs.tags - greeting.tags:
        return "it lacks the tag " + ", ".join(sorted(missing))
    return ""


def trains(greeting: Greeting, needs: Needs) -> bool:
    """Whether the device has what to train on."""
    return not needs.data_name or needs.data_name in greeting.train_data_names


def evaluates(greeting: Greeting, needs: Needs) -> bool:
    """Whether the device has what to measure on."""
    return not needs.data_name or needs.data_name in greeting.validation_data_names


def names_of(devices: Iterable[tuple[str, str]]) -> Mapping[str, str]:
    """(device_id, name) pairs as the name -> id map that a registry starts from."""
    return {name: device_id for device_id, name in devices}
