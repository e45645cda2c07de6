"""Reads the record of a testbed's run, whole or cut by a crash."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from fleetune.coordinator.testbed import plain
from fleetune.coordinator.testbed.backend import Sample
from fleetune.coordinator.testbed.record import Acted, Began, Checked, Ended, Sampled
from fleetune.errors import ConfigError

NAMES_MAX = 5
SUBMIT_S = 60.0
"""Handing in a job takes less."""


class RecordError(ConfigError):
    """A file that is no record of a testbed's run; says the line and what is wrong with it."""


@dataclass(frozen=True)
class Record:
    """A run as it was told. `samples` and `acts` stand in the order of their times."""

    began: Began
    samples: tuple[Sampled, ...]
    acts: tuple[Acted, ...]
    ended: Ended | None
    """None where the run was cut short."""
    checked: Checked | None
    """None where nobody has looked at the coordinator's history."""
    notes: tuple[str, ...]
    """What the reader left out, in words."""

    @property
    def origin_unix_s(self) -> float:
        """Zero of every time in the report: when the job was handed in, which is a moment before its record begins."""
        submitted = plain.number(self.ended.report.get("submitted_unix_s")) if self.ended is not None else None
        began = self.began.at_unix_s
        return submitted if submitted is not None and 0 <= began - submitted <= SUBMIT_S else began

    @property
    def end_unix_s(self) -> float:
        """When the job ended; in a record that does not know, when the last thing happened that it tells."""
        done = plain.number(self.ended.report.get("ended_unix_s")) if self.ended is not None else None
        if done is not None and self.ended is not None and self.origin_unix_s < done <= self.ended.at_unix_s:
            return done
        last = [self.began.at_unix_s, *(item.at_unix_s for item in self.samples[-1:]), *(item.at_unix_s for item in self.acts[-1:])]
        return self.ended.at_unix_s if self.ended is not None else max(last)


def read(path: Path) -> Record:
    """The record in a file. RecordError where it is none; a last line that was cut off is left out and noted."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read: {error.strerror}.", "A record is written by `fleetune testbed run`; name its folder."
        ) from error
    return parse(content, str(path))


def parse(content: bytes, name: str) -> Record:
    """`content` as a record; `name` is what messages call it."""
    lines = content.split(b"\n")
    notes: list[str] = []
    began: Began | None = None
    ended: Ended | None = None
    checked: Checked | None = None
    samples: list[Sampled] = []
    acts: list[Acted] = []
    unknown: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            fact = _object(line, place)
        except RecordError:
            # Only what no newline ends was being written when the run was cut off.
            if number < len(lines) or began is None:
                raise
            notes.append("the last line of the record is cut off; the report goes without it")
            continue
        what = plain.text(fact.get("what"))
        if began is None and what != "began":
            raise RecordError(f"{place}: the first line of a record tells what began, not {what or 'nothing'!r}.", "Is it a record?")
        if what == "began":
            if began is not None:
                raise RecordError(f"{place}: a second run begins here.", "Give each run a file of its own.")
            began = _began(fact, place)
        elif what == "sampled":
            samples.append(_sampled(fact, place))
        elif what == "acted":
            acts.append(_acted(fact, place))
        elif what == "ended":
            ended = _ended(fact, place)
        elif what == "checked":
            checked = Checked(_at(fact, place), _objects(fact.get("history")))
        else:
            unknown[what] += 1
    if began is None:
        raise RecordError(f"{name} is empty.", "The run has ended before it began; run it again.")
    for what, times in sorted(unknown.items())[:NAMES_MAX]:
        notes.append(f"{times} lines of an unknown sort ({what[:40]!r}) are left out")
    if ended is None:
        notes.append("the record has no end: the run goes on or was cut off, so rounds, metrics and failures are not known yet")
    samples.sort(key=lambda item: item.at_unix_s)
    acts.sort(key=lambda item: item.at_unix_s)
    return Record(began, tuple(samples), tuple(acts), ended, checked, tuple(notes))


def _object(line: bytes, place: str) -> dict[str, object]:
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise RecordError(f"{place}: no JSON: {error}.", "Each line of a record is one JSON object.") from error
    fact = plain.table(value)
    if not fact:
        raise RecordError(f"{place}: no JSON object, or an empty one.", "Each line of a record is one JSON object.")
    return dict(fact)


def _at(fact: dict[str, object], place: str) -> float:
    at = plain.number(fact.get("at_unix_s"))
    if at is None:
        raise RecordError(f"{place}: at_unix_s is {fact.get('at_unix_s')!r}, not a time.", "It is in seconds since 1970.")
    return at


def _word(fact: dict[str, object], key: str, place: str) -> str:
    value = fact.get(key)
    if not isinstance(value, str):
        raise RecordError(f"{place}: {key} is {value!r}, not a text.", "Was the record edited?")
    return value


def _words(value: object) -> dict[str, str]:
    return {name: word for name, word in plain.table(value).items() if isinstance(word, str)}


def _objects(value: object) -> list[dict[str, object]]:
    return [dict(item) for item in plain.tables(value)]


def _began(fact: dict[str, object], place: str) -> Began:
    return Began(
        at_unix_s=_at(fact, place),
        backend=_word(fact, "backend", place),
        spec=dict(plain.table(fact.get("spec"))),
        chaos=_objects(fact.get("chaos")),
        machine=dict(plain.table(fact.get("machine"))),
        job_id=plain.text(fact.get("job_id")),
        job=plain.text(fact.get("job")),
    )


def _sampled(fact: dict[str, object], place: str) -> Sampled:
    return Sampled(
        at_unix_s=_at(fact, place),
        members={name: _sample(plain.table(value)) for name, value in plain.table(fact.get("members")).items()},
        lives=_words(fact.get("lives")),
        stages=_words(fact.get("stages")),
        round_number=plain.count(fact.get("round_number")),
        phase=plain.text(fact.get("phase")),
    )


_COUNTED = frozenset(field.name for field in fields(Sample)) - {"cpu_s", "energy_j"}


def _sample(value: object) -> Sample:
    told = plain.table(value)
    counts = {name: (int(found) if (found := plain.number(told.get(name))) is not None else None) for name in _COUNTED}
    return Sample(
        cpu_s=plain.number(told.get("cpu_s")),
        memory_bytes=counts["memory_bytes"],
        memory_peak_bytes=counts["memory_peak_bytes"],
        sent_bytes=counts["sent_bytes"],
        received_bytes=counts["received_bytes"],
        out_of_memory_kills=counts["out_of_memory_kills"],
        energy_j=plain.number(told.get("energy_j")),
    )


def _acted(fact: dict[str, object], place: str) -> Acted:
    return Acted(_at(fact, place), _word(fact, "member", place), _word(fact, "act", place), plain.text(fact.get("text")))


def _ended(fact: dict[str, object], place: str) -> Ended:
    return Ended(
        at_unix_s=_at(fact, place),
        status=_word(fact, "status", place),
        report=dict(plain.table(fact.get("report"))),
        devices=_objects(fact.get("devices")),
        history=_objects(fact.get("history")),
        notes=[note for note in plain.items(fact.get("notes")) if isinstance(note, str)],
    )
