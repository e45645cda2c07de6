"""Rows of text on this machine's disk, checked against the job's data contract."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fleetune.errors import DataError, UnsupportedError
from fleetune.model.recipe import CLASSIFICATION, SEQ2SEQ_LM, Columns, Recipe

FORMATS: Mapping[str, str] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
COMPLAINTS_KEPT = 20
CSV_FIELD_CHARS_MAX = 64 << 20
_SHOWN_CHARS = 60
_SHOWN_LABELS = 30
_ROLES = ("system", "user", "assistant", "tool")

Message = tuple[str, str]
"""Role and content of one turn."""


@dataclass(frozen=True)
class Row:
    """One row in our own words; which fields are filled depends on the contract's columns.

    `text` is the text or the input, `second` the text pair or the target, `label` an id or -1, `messages` a chat.
    """

    text: str = ""
    second: str | None = None
    label: int = -1
    messages: tuple[Message, ...] = ()


def read(path: Path, file_format: str | None, recipe: Recipe) -> list[Row]:
    """All rows of a JSONL, CSV or Parquet file, in file order.

    Raises DataError that lists up to COMPLAINTS_KEPT faults at once, each with file, line, value and what is allowed,
    and UnsupportedError where Parquet is asked for and pyarrow is absent.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"The data file {str(path)!r} {what}.", f"Correct the path of the data {recipe.data.name!r} in this device's configuration."
        )
    check = _Check(path, recipe)
    rows: list[Row] = []
    try:
        for line, raw in _records(path, _format(path, file_format), recipe, check):
            row = check.row(line, raw)
            if row is not None:
                rows.append(row)
            if check.full:
                break
    except OSError as error:
        raise DataError(
            f"The data file {str(path)!r} cannot be read: {error.strerror or error}.", "Check its owner and its disk."
        ) from error
    check.finish()
    if not rows:
        raise DataError(f"The data file {str(path)!r} holds no rows.", f"Put rows of the data {recipe.data.name!r} there.")
    return rows


def _format(path: Path, named: str | None) -> str:
    chosen = named or FORMATS.get(path.suffix.lower(), "")
    if chosen not in {"jsonl", "csv", "parquet"}:
        raise DataError(
            f"The format of the data file {str(path)!r} is not known ({named or path.suffix or 'no ending'}); "
            "allowed: jsonl, csv, parquet.",
            "Set `format` beside the path in this device's configuration.",
        )
    return chosen


def _records(path: Path, file_format: str, recipe: Recipe, check: _Check) -> Iterator[tuple[int, Mapping[str, object]]]:
    if file_format == "jsonl":
        return _jsonl(path, check)
    if file_format == "csv":
        return _csv(path, recipe.data.columns, check)
    return _parquet(path, recipe.data.columns, check)


def _jsonl(path: Path, check: _Check) -> Iterator[tuple[int, Mapping[str, object]]]:
    # Bytes split at LF only; text files would also split at U+2028 and the like, which JSON strings may hold.
    with open(path, "rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record: object = json.loads(raw)
            except (ValueError, RecursionError) as error:
                check.complain(line, f"is not JSON: {error}")
                continue
            if isinstance(record, dict):
                yield line, cast("dict[str, object]", record)
            else:
                check.complain(line, f"holds {_shown(record)}, an object of columns is needed")


def _csv(path: Path, columns: Columns, check: _Check) -> Iterator[tuple[int, Mapping[str, object]]]:
    csv.field_size_limit(CSV_FIELD_CHARS_MAX)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="", restval=None)
        try:
            check.columns(reader.fieldnames or (), columns)
            for record in reader:
                yield reader.line_num, cast("Mapping[str, object]", record)
        except (csv.Error, UnicodeDecodeError) as error:
            check.complain(reader.line_num + 1, f"is not CSV in UTF-8: {error}")


def _parquet(path: Path, columns: Columns, check: _Check) -> Iterator[tuple[int, Mapping[str, object]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"The data file {str(path)!r} is Parquet and the package pyarrow is not installed here.",
            "Install pyarrow on this device, or store the rows as JSONL.",
        ) from error
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            check.columns(file.schema_arrow.names, columns)
            for batch in file.iter_batches(columns=list(columns.named())):
                for record in batch.to_pylist():
                    line += 1
                    yield line, record
    except pyarrow.ArrowException as error:
        check.complain(line + 1, f"is not Parquet: {error}")


class _Check:
    """Turns raw records into rows and collects what is wrong with them. Owned by one call of `read`."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self._path = path
        self._recipe = recipe
        self._label_ids = {label: index for index, label in enumerate(recipe.labels)}
        self._complaints: list[str] = []

    @property
    def full(self) -> bool:
        return len(self._complaints) >= COMPLAINTS_KEPT

    def complain(self, line: int, text: str) -> None:
        self._complaints.append(f"{self._path}:{line}: {text}")

    def columns(self, present: Iterable[str], wanted: Columns) -> None:
        """A missing column is told once, not once a row."""
        names = list(present)
        absent = [name for name in wanted.named() if name not in names]
        if absent:
            raise DataError(
                f"The data file {str(self._path)!r} has no column {', '.join(map(repr, absent))}; "
                f"it has: {', '.join(map(repr, names)) or 'none'}.",
                "Rename the column, or correct the columns in the job.",
            )

    def row(self, line: int, raw: Mapping[str, object]) -> Row | None:
        before = len(self._complaints)
        columns = self._recipe.data.columns
        if columns.chat:
            row = Row(messages=self._messages(line, raw.get(columns.chat), columns.chat, columns.chat in raw))
        elif self._recipe.model_task == CLASSIFICATION:
            second = self._text(line, raw, columns.text_pair) if columns.text_pair else None
            row = Row(self._text(line, raw, columns.text or columns.input), second, self._label(line, raw, columns.label))
        elif columns.input or columns.target or self._recipe.model_task == SEQ2SEQ_LM:
            row = Row(self._text(line, raw, columns.input or columns.text), self._text(line, raw, columns.target))
        else:
            row = Row(self._text(line, raw, columns.text))
        return row if len(self._complaints) == before else None

    def finish(self) -> None:
        """Raises DataError with everything that was collected."""
        if not self._complaints:
            return
        rows = "rows do" if len(self._complaints) > 1 else "row does"
        count = f"at least {len(self._complaints)}" if self.full else str(len(self._complaints))
        raise DataError(
            f"{count} {rows} not meet the contract of the data {self._recipe.data.name!r}:\n  " + "\n  ".join(self._complaints) + "\n",
            "Correct these rows on the device, or the columns and labels in the job.",
        )

    def _text(self, line: int, raw: Mapping[str, object], column: str) -> str:
        value = raw.get(column)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
        self._complain_value(line, raw, column, "a text that is not empty")
        return ""

    def _label(self, line: int, raw: Mapping[str, object], column: str) -> int:
        value = raw.get(column)
        labels = self._recipe.labels
        if isinstance(value, str) and value in self._label_ids:
            return self._label_ids[value]
        if isinstance(value, str) and value.strip() in self._label_ids:
            return self._label_ids[value.strip()]
        number = _whole(value)
        if number is not None and 0 <= number < len(labels):
            return number
        shown = ", ".join(labels[:_SHOWN_LABELS]) + (", ..." if len(labels) > _SHOWN_LABELS else "")
        self._complain_value(line, raw, column, f"{shown}, or an id from 0 to {len(labels) - 1}")
        return -1

    def _messages(self, line: int, value: object, column: str, present: bool) -> tuple[Message, ...]:
        if isinstance(value, str):
            # CSV has no lists: a chat is a JSON text there.
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        messages: list[Message] = []
        if isinstance(value, list):
            for item in cast("list[object]", value):
                fields = cast("dict[str, object]", item) if isinstance(item, dict) else {}
                role, content = fields.get("role"), fields.get("content")
                if not isinstance(content, str) or role not in _ROLES:
                    self.complain(
                        line,
                        f"column {column!r} has the turn {_shown(item)}; a role of {', '.join(_ROLES)} and a text as content are needed",
                    )
                    return ()
                messages.append((str(role), content))
        if not messages or all(role != "assistant" for role, _ in messages):
            found = _shown(value) if present else "nothing"
            self.complain(line, f"column {column!r} holds {found}; a list of turns with at least one of the assistant is needed")
        return tuple(messages)

    def _complain_value(self, line: int, raw: Mapping[str, object], column: str, allowed: str) -> None:
        if column not in raw:
            self.complain(line, f"column {column!r} is missing; the row has: {', '.join(map(repr, list(raw)[:12])) or 'nothing'}")
        elif raw[column] is None or raw[column] == "":
            self.complain(line, f"column {column!r} is empty; allowed: {allowed}")
        else:
            self.complain(line, f"column {column!r} is {_shown(raw[column])}; allowed: {allowed}")


def _whole(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)  # a column with gaps becomes floating point in many tools
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."
