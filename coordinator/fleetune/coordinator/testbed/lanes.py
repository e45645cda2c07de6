"""What each member of a testbed did at which time, and which faults it had: the record's samples and acts as stretches."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fleetune.coordinator.testbed import plain
from fleetune.coordinator.testbed.backend import COORDINATOR
from fleetune.coordinator.testbed.record import Acted, Sampled
from fleetune.coordinator.testbed.records import Record

Activity = Literal[
    "download", "load", "measure", "compute", "evaluate", "upload", "idle", "prepare", "collect", "fold", "paused", "down", "unknown"
]
"""What a member is at. `idle` includes a task that waits its turn; `collect` is the coordinator's while devices train; `down` is no
process, `unknown` a time that nobody watched."""

ACTIVITIES: tuple[Activity, ...] = (
    "download",
    "load",
    "measure",
    "compute",
    "evaluate",
    "upload",
    "prepare",
    "collect",
    "fold",
    "idle",
    "paused",
    "down",
    "unknown",
)
AT_WORK: frozenset[Activity] = frozenset({"download", "load", "measure", "compute", "evaluate", "upload", "prepare", "collect", "fold"})

_STAGES: Mapping[str, Activity] = {
    "queued": "idle",
    "fetching base": "download",
    "fetching state": "download",
    "loading": "load",
    "measuring": "measure",
    "training": "compute",
    "evaluating": "evaluate",
    "uploading": "upload",
}
_PHASES: Mapping[str, Activity] = {
    "preparing": "prepare",
    "measuring": "measure",
    "training": "collect",
    "folding": "fold",
    "evaluating": "evaluate",
}
_STILL: Mapping[str, Activity] = {"paused": "paused", "ended": "down", "missing": "down"}

UNDOINGS: Mapping[str, str] = {"restart": "kill", "resume": "pause", "mend": "cut", "unthrottle": "throttle", "free_disk": "fill_disk"}
"""Act that undoes -> the kind of fault that it undoes. An out-of-memory is over once it has happened."""

NOT_DONE = "could not be done"
"""How the text of an act begins that the machine refused: no fault was made, or it was not undone."""

_STOPPING: Mapping[str, Activity] = {"kill": "down", "pause": "paused"}

_ENDING = frozenset({"kill", "out_of_memory"})
_LOST: frozenset[Activity] = frozenset({"compute", "measure", "evaluate"})
"""What a fresh process cannot be at before it has loaded."""

STALE_S = 1.5
"""A look's distance, and half of it."""

HEARD_S = 20.0
"""A coordinator that runs again is asked again, and has answered, within this."""

ASKED_S = 15.0
"""To take a member's memory takes less."""

GAP_MEDIANS = 5.0
"""A sample speaks until the next one, but for no longer than so many usual distances of samples."""

GAP_LEAST_S = 3.0


@dataclass(frozen=True)
class Stretch:
    """Times are in seconds from the run's beginning."""

    activity: Activity
    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass(frozen=True)
class Fault:
    """One fault that was made. `end_s` is when it was undone; None where the record ends before; `begin_s` for an out-of-memory."""

    kind: str
    member: str
    begin_s: float
    end_s: float | None
    text: str


@dataclass(frozen=True)
class Killing:
    """The kernel has killed processes of a member for lack of memory, without having been asked to."""

    member: str
    at_s: float
    processes: int


@dataclass(frozen=True)
class Lane:
    """One member's run. `stretches` follow each other without overlap."""

    member: str
    kind: str
    stretches: tuple[Stretch, ...]
    faults: tuple[Fault, ...]
    killings: tuple[Killing, ...]

    def seconds(self) -> dict[Activity, float]:
        """How long it was at what; every activity has an entry."""
        found = dict.fromkeys(ACTIVITIES, 0.0)
        for stretch in self.stretches:
            found[stretch.activity] += stretch.seconds
        return found


def kinds_of(record: Record) -> dict[str, str]:
    """Device -> its kind, in the order of the testbed's file; devices that only samples name come after them, without a kind."""
    kinds = {plain.text(item.get("name")): plain.text(item.get("kind")) for item in plain.tables(record.began.spec.get("devices"))}
    for sampled in record.samples:
        for name in sampled.lives:
            kinds.setdefault(name, "")
    return {name: kind for name, kind in kinds.items() if name and name != COORDINATOR}


def lanes(record: Record) -> tuple[Lane, ...]:
    """One for each device, then the coordinator's."""
    found = faults(record.acts, record.origin_unix_s)
    fresh = _fresh(record, found)
    made = [_lane(record, name, kind, found, fresh) for name, kind in kinds_of(record).items()]
    return (*made, _lane(record, COORDINATOR, "", found, fresh))


def _fresh(record: Record, all_faults: Sequence[Fault]) -> list[bool]:
    """Of each sample, whether what it tells of the job is news: not while the coordinator is away, nor before it is heard again.

    Until then samples repeat its last words, so only what differs from them is known to be new; but it is heard within `HEARD_S`.
    """
    kills = [fault.begin_s for fault in all_faults if fault.member == COORDINATOR and fault.kind == "kill"]
    found: list[bool] = []
    last_words: object = None
    before_s = away_s = 0.0
    for sampled in record.samples:
        at_s = sampled.at_unix_s - record.origin_unix_s
        words = (sampled.stages, sampled.phase, sampled.round_number)
        away = sampled.lives.get(COORDINATOR, "running") != "running"
        if away or any(before_s < kill_s <= at_s for kill_s in kills):
            last_words, away_s = words, at_s
        elif words != last_words or at_s - away_s > HEARD_S:
            last_words = None
        found.append(last_words is None and not away)
        before_s = at_s
    return found


def faults(acts: Iterable[Acted], origin_unix_s: float) -> tuple[Fault, ...]:
    """Each fault that was made, with the act that undid it: the first such act on the same member after it."""
    made: list[Fault] = []
    for act in acts:
        if act.text.startswith(NOT_DONE):
            continue
        at_s = act.at_unix_s - origin_unix_s
        undone = UNDOINGS.get(act.act)
        if undone is None:
            made.append(Fault(act.act, act.member, at_s, at_s if act.act == "out_of_memory" else None, act.text))
            continue
        for index, fault in enumerate(made):
            if fault.member == act.member and fault.kind == undone and fault.end_s is None:
                made[index] = replace(fault, end_s=at_s)
                break
    return tuple(made)


def _lane(record: Record, member: str, kind: str, all_faults: Sequence[Fault], fresh: Sequence[bool]) -> Lane:
    own = tuple(fault for fault in all_faults if fault.member == member)
    stretches = _stretches(record, member, fresh)
    end_s = record.end_unix_s - record.origin_unix_s
    for fault in own:
        if fault.kind in _STOPPING:
            # The acts' own times are exact; samples only see them within a second.
            until_s = min(end_s, fault.end_s if fault.end_s is not None else end_s)
            stretches = _laid_over(stretches, Stretch(_STOPPING[fault.kind], fault.begin_s, until_s))
            if fault.kind == "kill":
                looks = (sampled.at_unix_s - record.origin_unix_s for sampled in record.samples)
                seen_s = next((at_s for at_s in looks if at_s >= until_s), end_s)
                stretches = _laid_over(stretches, Stretch("unknown", until_s, min(end_s, seen_s)))
    return Lane(member, kind, tuple(_joined(stretches)), own, tuple(_killings(record, member, own)))


def _stretches(record: Record, member: str, fresh: Sequence[bool]) -> list[Stretch]:
    origin, last, samples = record.origin_unix_s, record.end_unix_s, record.samples
    steps = [after.at_unix_s - before.at_unix_s for before, after in itertools.pairwise(samples)]
    gap_s = max(GAP_LEAST_S, GAP_MEDIANS * statistics.median(steps)) if steps else GAP_LEAST_S
    found: list[Stretch] = []
    for index, sampled in enumerate(samples):
        begin = sampled.at_unix_s
        until = samples[index + 1].at_unix_s if index + 1 < len(samples) else last
        until = min(until, last)
        seen = min(until, begin + gap_s)
        found.append(Stretch(_activity(sampled, member, fresh[index]), begin - origin, seen - origin))
        if until > seen:
            found.append(Stretch("unknown", seen - origin, until - origin))
    return [stretch for stretch in found if stretch.end_s > stretch.begin_s]


def _activity(sampled: Sampled, member: str, fresh: bool) -> Activity:
    life = sampled.lives.get(member)
    if life is None:
        return "unknown"
    if life in _STILL:
        return _STILL[life]
    if not fresh:
        return "unknown"  # only the coordinator tells what it and the devices are at
    if member == COORDINATOR:
        return _PHASES.get(sampled.phase, "idle")
    return _STAGES.get(sampled.stages.get(member, ""), "idle")


def _laid_over(below: Sequence[Stretch], above: Stretch) -> list[Stretch]:
    found: list[Stretch] = []
    for stretch in below:
        parts = (
            replace(stretch, end_s=min(stretch.end_s, above.begin_s)),
            replace(stretch, begin_s=max(stretch.begin_s, above.end_s)),
        )
        found += [part for part in parts if part.end_s > part.begin_s]
    if above.end_s > above.begin_s:
        found.append(above)
    return sorted(found, key=lambda item: item.begin_s)


def _joined(stretches: Iterable[Stretch]) -> list[Stretch]:
    found: list[Stretch] = []
    for stretch in stretches:
        if found and found[-1].activity == stretch.activity and abs(found[-1].end_s - stretch.begin_s) < 1e-6:
            found[-1] = replace(found[-1], end_s=stretch.end_s)
        else:
            found.append(stretch)
    return found


def _killings(record: Record, member: str, own: Sequence[Fault]) -> Iterable[Killing]:
    last: int | None = None
    before_s = 0.0
    for sampled in record.samples:
        sample = sampled.members.get(member)
        value = sample.out_of_memory_kills if sample is not None else None
        if value is None:
            continue
        at_s = sampled.at_unix_s - record.origin_unix_s
        # What was counted before the first look is not of this run; a lower count is one that began anew.
        grown = 0 if last is None else value - last if value >= last else value
        # The act is told when it has happened, which a look may have seen before.
        asked = any(fault.kind == "out_of_memory" and before_s - 1 <= fault.begin_s <= at_s + ASKED_S for fault in own)
        if grown > 0 and not asked:
            yield Killing(member, at_s, grown)
        last, before_s = value, at_s


def activity_at(lane: Lane, at_s: float) -> Activity:
    """What a member was at just before a moment."""
    for stretch in lane.stretches:
        if stretch.begin_s < at_s <= stretch.end_s:
            return stretch.activity
    return "unknown"


def back_s(fault: Fault, lane: Lane) -> float | None:
    """Seconds from a fault's making until its member was seen at work again after the undoing; None where it was not, any more.

    A process that was killed has lost its training: what looks as if it simply went on is the coordinator's last word of it, and not
    taken for work.
    """
    if fault.end_s is None:
        return None
    stale = activity_at(lane, fault.begin_s) if fault.kind in _ENDING else "unknown"
    for stretch in lane.stretches:
        if stretch.end_s <= fault.end_s or stretch.activity not in AT_WORK:
            continue
        if stretch.activity == stale and stale in _LOST and stretch.begin_s <= fault.end_s + STALE_S:
            continue
        return max(stretch.begin_s, fault.end_s) - fault.begin_s
    return None


def trained_again(record: Record, device: str) -> int:
    """How often it began to train anew within a round in which it had trained already: its task was lost on the way.

    Between the two trainings it was down or waited, fetched or loaded again; a mere gap, as when the coordinator is away, is not counted.
    """
    found, round_number, trained, lost = 0, -1, False, False
    for sampled in record.samples:
        if sampled.round_number and sampled.round_number != round_number:
            round_number, trained, lost = sampled.round_number, False, False
        stage = sampled.stages.get(device, "")
        if sampled.lives.get(device) in ("ended", "missing") or stage in ("queued", "fetching base", "fetching state", "loading"):
            lost = trained
        elif stage == "training":
            found += lost
            trained, lost = True, False
        elif stage == "evaluating":
            trained = lost = False
    return found
