"""Values out of a TOML document: what is wrong becomes a complaint, and a harmless value stands in for it, so that one look finds all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fleetune import tomltext
from fleetune.complaints import Complaint, ComplaintsError, did_you_mean, shown
from fleetune.errors import ConfigError

COMPLAINTS_MAX = 200


def document(subject: str, text: str) -> dict[str, object]:
    """ComplaintsError where the text is no TOML."""
    try:
        return tomltext.parse(text)
    except tomltext.TomlError as error:
        place = f"line {error.line}, column {error.column}" if error.line else "end of the file"
        raise ComplaintsError(subject, [Complaint("", "", "TOML 1.0", f"{place}: {error.reason}.")]) from error


def read_text(subject: str, file: Path) -> str:
    """ConfigError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {subject} {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{subject} {file} is not UTF-8 text.") from error


@dataclass
class Complaints:
    """Gathered while a file is read."""

    found: list[Complaint] = field(default_factory=list[Complaint])

    def add(self, path: str, value: object, allowed: str, remedy: str) -> None:
        """`value` None is a missing one."""
        if len(self.found) < COMPLAINTS_MAX:
            self.found.append(Complaint(path, "" if value is None else shown(value), allowed, remedy))

    def end(self, subject: str) -> None:
        """ComplaintsError with all of them, if there are any."""
        if self.found:
            raise ComplaintsError(subject, self.found)


class Table:
    """One table of the document. Every name in it must have been asked for when `end` is called."""

    def __init__(self, complaints: Complaints, path: str, value: object, known: Sequence[str]) -> None:
        self._complaints = complaints
        self._path = path
        self._known = known
        self._values: dict[str, object] = {}
        found = tomltext.table(value)
        if found is None:
            complaints.add(path, value, "a table", f"Write its settings under a line [{path}].")
            return
        for name, item in found.items():
            if name in known:
                self._values[name] = item
                continue
            near = did_you_mean(name, known)
            remedy = f"Unknown; did you mean {near}?" if near else "Unknown; remove it."
            complaints.add(self.path(name), item, ", ".join(known), remedy)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def path(self, name: str) -> str:
        shown_name = name if name.isprintable() and len(name) <= 64 else shown(name)
        return f"{self._path}.{shown_name}" if self._path else shown_name

    def wrong(self, name: str, allowed: str, remedy: str) -> None:
        """The value of `name` cannot be."""
        self._complaints.add(self.path(name), self._values.get(name), allowed, remedy)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self._values.get(name, default)
        allowed = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.wrong(name, allowed, "Write a number.")
            return default
        if not math.isfinite(value) or not low <= value <= high:
            self.wrong(name, allowed, f"Set {self.path(name)} to {allowed}.")
            return default
        return float(value)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            allowed = f"a whole number from {low} to {high}"
            self.wrong(name, allowed, f"Set {self.path(name)} to {allowed}.")
            return default
        return value

    def word(self, name: str, default: str, allowed: Sequence[str]) -> str:
        """One of some words; the default where it is missing or wrong, and "" as default makes it required."""
        value = self._values.get(name, default)
        if isinstance(value, str) and value in allowed:
            return value
        words = ", ".join(allowed)
        if name not in self._values:
            self.wrong(name, words, "It is missing.")
        else:
            near = did_you_mean(value, allowed) if isinstance(value, str) else ""
            self.wrong(name, words, f"Did you mean {shown(near)}?" if near else f"Set {self.path(name)} to one of them.")
        return default

    def text(self, name: str, default: str, allowed: str) -> str:
        """Any text; `allowed` says which in words, for the complaint."""
        value = self._values.get(name, default)
        if isinstance(value, str):
            return value
        self.wrong(name, allowed, "Write it in quotes.")
        return default

    def tables(self, name: str, most: int) -> list[tuple[str, object]]:
        """The items of an array of tables, each with its path."""
        items = tomltext.array(self._values.get(name, []))
        path = self.path(name)
        if items is None:
            self.wrong(name, "an array of tables", f"Write each under a line [[{path}]].")
            return []
        if len(items) > most:
            self._complaints.add(path, f"{len(items)} tables", f"{most} at the most", "Take fewer.")
        return [(f"{path}[{index}]", item) for index, item in enumerate(items[:most], start=1)]

    def table(self, name: str, known: Sequence[str]) -> Table:
        """A table in this one; an empty one where it is missing."""
        return Table(self._complaints, self.path(name), self._values.get(name, {}), known)
