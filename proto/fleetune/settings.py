"""Settings as rows of a table: one row per setting drives reading, checking, environment, overrides and the reference page."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetune import tomltext
from fleetune.complaints import SHOWN_CHARACTERS_MAX, Complaint, did_you_mean, shown
from fleetune.errors import ConfigError

Value = str | int | float | bool | Path | tuple[str, ...]

_NUMBER_MAX = 2**63 - 1
_DEPTH_MAX = 4
"""No table here is deeper; dotted keys could otherwise nest thousands of levels."""


class Kind(enum.Enum):
    """What a setting holds; the value is how the reference page calls it."""

    TEXT = "text"
    INTEGER = "whole number"
    NUMBER = "number"
    SWITCH = "true or false"
    TEXTS = "array of texts"
    PLACE = "path"


@dataclass(frozen=True)
class Setting:
    """One setting. A `*` in `path` stands for any name that the owner chooses, as in "data.*.train".

    `check` gets each text and answers what is allowed where the text is wrong, or "".
    `default_words` replaces the default on the reference page where it is only known at run time.
    """

    path: str
    kind: Kind
    default: Value
    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    check: Callable[[str], str] | None = None
    default_words: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.path.split("."))

    @property
    def allowed(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return ", ".join(self.choices)
        bounds = ""
        if self.minimum is not None and self.maximum is not None:
            bounds = f" from {self.minimum:g} to {self.maximum:g}"
        elif self.minimum is not None:
            bounds = f" of at least {self.minimum:g}"
        article = "" if self.kind is Kind.SWITCH else "an " if self.kind is Kind.TEXTS else "a "
        return f"{article}{self.kind.value}{bounds}"


@dataclass(frozen=True)
class Sources:
    """Where values come from, later ones winning: a file's document, the environment, the command line.

    Relative paths count from `folder` in the file and from `working_folder` elsewhere.
    `overrides` are keyed by dotted path and hold values as TOML would, or texts as the environment does.
    """

    document: Mapping[str, object]
    folder: Path
    environment: Mapping[str, str]
    environment_prefix: str
    overrides: Mapping[str, object]
    working_folder: Path


@dataclass(frozen=True)
class Settings:
    """Every setting's value by its full path, and what was wrong. Values of wrong settings are their defaults."""

    values: Mapping[tuple[str, ...], Value]
    complaints: tuple[Complaint, ...]
    unused_environment: tuple[str, ...]

    def text(self, *path: str) -> str:
        value = self.values[_parts(path)]
        assert isinstance(value, str)
        return value

    def integer(self, *path: str) -> int:
        value = self.values[_parts(path)]
        assert isinstance(value, int)
        return value

    def number(self, *path: str) -> float:
        value = self.values[_parts(path)]
        assert isinstance(value, (int, float))
        return float(value)

    def switch(self, *path: str) -> bool:
        value = self.values[_parts(path)]
        assert isinstance(value, bool)
        return value

    def texts(self, *path: str) -> tuple[str, ...]:
        value = self.values[_parts(path)]
        assert isinstance(value, tuple)
        return value

    def place(self, *path: str) -> Path | None:
        """A path, or None where the setting is empty."""
        value = self.values[_parts(path)]
        if value == "":
            return None
        assert isinstance(value, Path)
        return value

    def names(self, section: str) -> tuple[str, ...]:
        """The names that the owner chose in a section of free names, in their order."""
        found: dict[str, None] = {}
        for path in self.values:
            if path[0] == section and len(path) > 1:
                found[path[1]] = None
        return tuple(found)


def read(table: Sequence[Setting], sources: Sources) -> Settings:
    """The value of every row of `table`, and of every name found for a row with `*`. Raises nothing: complaints are part of the answer."""
    values: dict[tuple[str, ...], Value] = {row.parts: row.default for row in table if "*" not in row.parts}
    complaints: list[Complaint] = []

    def take(row: Setting, path: tuple[str, ...], found: object, folder: Path, origin: str, as_text: bool) -> None:
        if "*" in row.parts:
            for parts, default in _defaults_of_name(table, path[:2]):
                values.setdefault(parts, default)
        value = _from_text(row, found) if as_text and isinstance(found, str) else found
        wrong = _why_wrong(row, value)
        if wrong:
            complaints.append(Complaint(origin or ".".join(path), shown(found), wrong, f"Set {dotted(path)} to {wrong}."))
        else:
            values[path] = _typed(row, value, folder)

    for path, found in _leaves(sources.document, ()):
        row = _row(table, path)
        if row is not None:
            take(row, path, found, sources.folder, dotted(path), as_text=False)
        elif _is_section(table, path) and found == {}:
            if len(path) > 1:
                # A chosen name without any setting: its rows exist, so that the caller can say what it needs.
                values.update(_defaults_of_name(table, path))
        else:
            complaints.append(_unknown(table, path, found))
    unused: list[str] = []
    by_variable = {variable(sources.environment_prefix, row): row for row in table if "*" not in row.parts}
    for name, found_text in sorted(sources.environment.items()):
        named = by_variable.get(name)
        if named is not None:
            take(named, named.parts, found_text, sources.working_folder, name, as_text=True)
        elif name.startswith(sources.environment_prefix):
            # Only told, never refused: Kubernetes sets variables such as FLEETUNE_AGENT_PORT for a service of that name.
            unused.append(name)
    for key, found in sources.overrides.items():
        path = _override_path(table, key)
        row = _row(table, path)
        if row is None:
            complaints.append(_unknown(table, path, found))
        else:
            take(row, path, found, sources.working_folder, dotted(path), as_text=True)
    return Settings(values, tuple(complaints), tuple(unused))


def read_file(path: Path) -> dict[str, object]:
    """A file's document. Raises ConfigError, naming the file, where it cannot be read or is no TOML."""
    try:
        return tomltext.read(path)
    except tomltext.TomlError as error:
        raise ConfigError(f"{path} is {error.message}", "Correct the file.") from error
    except OSError as error:
        raise ConfigError(
            f"The configuration {path} cannot be read: {error.strerror or error}.", "Correct the path or its rights."
        ) from error


def variable(prefix: str, row: Setting) -> str:
    """The environment variable of a row, such as FLEETUNE_AGENT_LIMITS_IDLE_ONLY."""
    return prefix + row.path.upper().replace(".", "_")


def dotted(path: Sequence[str]) -> str:
    """The path as TOML writes it: parts that are no bare keys in quotes, and those that are very long shortened."""
    return ".".join(part if _is_bare(part) else shown(part) for part in path)


def _is_bare(part: str) -> bool:
    return 0 < len(part) <= SHOWN_CHARACTERS_MAX and all((c.isalnum() and c.isascii()) or c in "_-*" for c in part)


def reference(table: Sequence[Setting], environment_prefix: str) -> str:
    """The rows as Markdown tables, one for each section."""
    lines: list[str] = []
    section: str | None = None
    for row in table:
        head, _, name = row.path.rpartition(".")
        if head != section:
            section = head
            title = f"`[{head.replace('*', 'NAME')}]`" if head else "Top of the file"
            lines += [
                "",
                f"### {title}",
                "",
                "| setting | takes | default | unit | what it does | environment |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
        default = row.default_words or (f"`{shown(_plain(row.default))}`")
        environment = "" if "*" in row.parts else f"`{variable(environment_prefix, row)}`"
        shown_name = '"NAME"' if name == "*" else name
        cells = (f"`{shown_name}`", row.allowed, default, row.unit, row.help, environment)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines[1:]) + "\n"


def _parts(path: tuple[str, ...]) -> tuple[str, ...]:
    """One dotted text, or the parts themselves where a chosen name may hold dots."""
    return tuple(path[0].split(".")) if len(path) == 1 else path


def _defaults_of_name(table: Sequence[Setting], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Value]]:
    """Paths and defaults of all rows with `*` under a section's chosen name: they exist as soon as the name does."""
    return [(_chosen(row.parts, path[1]), row.default) for row in table if row.parts[0] == path[0] and "*" in row.parts]


def _chosen(parts: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(name if part == "*" else part for part in parts)


def _leaves(document: Mapping[str, object], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, value in document.items():
        path = (*above, key)
        table = tomltext.table(value)
        if table and len(path) < _DEPTH_MAX:
            yield from _leaves(table, path)
        else:
            yield path, value


def _row(table: Sequence[Setting], path: tuple[str, ...]) -> Setting | None:
    for row in table:
        if len(row.parts) == len(path) and all(part in ("*", mine) for part, mine in zip(row.parts, path, strict=True)):
            return row
    return None


def _is_section(table: Sequence[Setting], path: tuple[str, ...]) -> bool:
    return any(
        len(row.parts) > len(path) and all(part in ("*", mine) for part, mine in zip(row.parts, path, strict=False)) for row in table
    )


def _unknown(table: Sequence[Setting], path: tuple[str, ...], found: object) -> Complaint:
    if _is_section(table, path):
        return Complaint(dotted(path), shown(found), f"a section [{dotted(path)}]", f"Write its settings under a line [{dotted(path)}].")
    for depth in range(1, len(path)):
        row = _row(table, path[:depth])
        if row is not None:
            return Complaint(dotted(path[:depth]), "a table", row.allowed, f"Set {dotted(path[:depth])} to {row.allowed}.")
    known = [row.path for row in table]
    here = [known_path for known_path in known if known_path.rpartition(".")[0] == ".".join(path[:-1])]
    near = did_you_mean(".".join(path), known)
    elsewhere = [known_path for known_path in known if known_path.rpartition(".")[2] == path[-1]]
    if near:
        remedy = f"Unknown; did you mean {near.replace('*', 'NAME')}?"
    elif elsewhere:
        remedy = f"Unknown here; did you mean {elsewhere[0].replace('*', 'NAME')}?"
    else:
        remedy = "Unknown; remove it."
    allowed = ", ".join(known_path.rpartition(".")[2] for known_path in here)
    return Complaint(dotted(path), shown(found), allowed, remedy)


def _override_path(table: Sequence[Setting], key: str) -> tuple[str, ...]:
    """The parts of a dotted key; the chosen name of a row with `*` keeps its own dots."""
    for row in table:
        head, star, tail = row.path.partition("*")
        if star and key.startswith(head) and key.endswith(tail) and len(key) > len(head) + len(tail):
            name = key[len(head) : len(key) - len(tail)] if tail else key[len(head) :]
            return _chosen(row.parts, name)
    return tuple(key.split("."))


def _from_text(row: Setting, text: str) -> object:
    """What a text from the environment or the command line means for this row; the text itself where it means nothing."""
    stripped = text.strip()
    if row.kind is Kind.TEXTS:
        return [part.strip() for part in stripped.split(",") if part.strip()]
    if row.kind is Kind.SWITCH:
        return {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}.get(
            stripped.lower(), text
        )
    if row.kind in (Kind.INTEGER, Kind.NUMBER):
        try:
            return int(stripped) if row.kind is Kind.INTEGER else float(stripped)
        except ValueError:
            return text
    return text


def _why_wrong(row: Setting, value: object) -> str:
    """What is allowed, where the value is wrong; else ""."""
    if row.kind is Kind.SWITCH:
        return "" if isinstance(value, bool) else row.allowed
    if row.kind in (Kind.INTEGER, Kind.NUMBER):
        if isinstance(value, bool) or not isinstance(value, int if row.kind is Kind.INTEGER else (int, float)):
            return row.allowed
        # No float holds a whole number of hundreds of digits, and TOML knows how to write one.
        if abs(value) > _NUMBER_MAX if isinstance(value, int) else not math.isfinite(value):
            return row.allowed
        too_small = row.minimum is not None and value < row.minimum
        too_large = row.maximum is not None and value > row.maximum
        return row.allowed if too_small or too_large else ""
    if row.kind is Kind.TEXTS:
        items = tomltext.array(value)
        if items is None:
            return row.allowed
        return next((wrong for wrong in (_why_wrong_text(row, item) for item in items) if wrong), "")
    if row.kind is Kind.PLACE and isinstance(value, Path):
        return ""
    return _why_wrong_text(row, value)


def _why_wrong_text(row: Setting, value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        return row.allowed
    if row.choices and value not in row.choices:
        return row.allowed
    return row.check(value) if row.check is not None else ""


def _typed(row: Setting, value: object, folder: Path) -> Value:
    """The checked value in the row's own type."""
    items = tomltext.array(value)
    if items is not None:
        return tuple(str(item) for item in items)
    if row.kind is Kind.PLACE and isinstance(value, str):
        return resolved(value, folder) if value else ""
    if row.kind is Kind.NUMBER and isinstance(value, (int, float)):
        return float(value)
    assert isinstance(value, (str, int, float, Path))
    return value


def resolved(text: str, folder: Path) -> Path:
    """A path as a file in `folder` means it: `~` is the home folder, relative ones count from `folder`."""
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        # `~nobody` where there is no such person: then it is a plain name.
        path = Path(text)
    return path if path.is_absolute() else folder / path


def _plain(value: Value) -> object:
    return str(value) if isinstance(value, Path) else value
