"""A job file's text becomes a `JobSpec`, or every complaint about it at once."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fleetune import tomltext
from fleetune.complaints import Complaint, ComplaintsError, did_you_mean, shown
from fleetune.coordinator import jobrules
from fleetune.coordinator.jobsections import (
    DataSection,
    DevicesSection,
    EvaluationSection,
    JobSpec,
    LoraSection,
    MethodSection,
    ModelSection,
    RoundsSection,
    TaskSection,
    TrainingSection,
    Words,
)

__all__ = [
    "Complaint",
    "DataSection",
    "DevicesSection",
    "EvaluationSection",
    "JobFileError",
    "JobSpec",
    "LoraSection",
    "MethodSection",
    "ModelSection",
    "RoundsSection",
    "TaskSection",
    "TrainingSection",
    "allowed_words",
    "parse",
    "section_models",
]

_SUGGESTION = re.compile(r"^Unknown; did you mean ([a-z0-9_.]+)\?$")

COMPLAINTS_MAX = 200
"""More help nobody, and a file made of unknown keys could ask for millions."""


class JobFileError(ComplaintsError):
    """A job file that cannot run; `complaints` holds every reason."""

    def __init__(self, complaints: Sequence[Complaint]) -> None:
        super().__init__("the job file", complaints)


def parse(text: str) -> JobSpec:
    """The job that a TOML text describes, completed by what depends on the task and the method.

    Looks at the text only: whether folders exist is `jobfolders.complaints`. Raises JobFileError with all complaints.
    """
    try:
        document = tomltext.parse(text)
    except tomltext.TomlError as error:
        place = f"line {error.line}, column {error.column}" if error.line else "end of the file"
        raise JobFileError([Complaint("", "", "TOML 1.0", f"{place}: {error.reason}.")]) from error
    complaints: list[Complaint] = []
    draft = _draft(document, complaints)
    # Whoever misspelt a required setting need not be told as well that it is missing.
    wrong = frozenset(complaint.path for complaint in complaints) | _nearest(complaints)
    complaints += jobrules.complaints(jobrules.Draft(draft, _given(document), wrong))
    if complaints:
        raise JobFileError(complaints[:COMPLAINTS_MAX])
    return jobrules.completed(draft)


def section_models() -> dict[str, type[BaseModel]]:
    """Section name to model, in the order of the file; "" is the top level."""
    found: dict[str, type[BaseModel]] = {"": JobSpec}
    for name, field in JobSpec.model_fields.items():
        model = _model_of(field)
        if model is not None:
            found[name] = model
    return found


def allowed_words(field: FieldInfo) -> str:
    """What a field takes, in words: used by complaints and by the reference page, so that both say the same."""
    words = next((marker.words for marker in field.metadata if isinstance(marker, Words)), "")
    return words or _allowed(field.annotation, _bounds(field.metadata))


def _draft(document: Mapping[str, object], complaints: list[Complaint]) -> JobSpec:
    """The job without the entries that are wrong by themselves; appends a complaint about each of those."""
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        places: set[tuple[str, ...]] = set()
        for details in error.errors(include_url=False, include_context=False):
            place = tuple(str(part) for part in details["loc"][: _depth(details["loc"])])
            if place in places:
                continue
            places.add(place)
            complaints.append(_complaint(place, details))
        return JobSpec.model_validate(_without(document, places))


def _depth(place: Sequence[int | str]) -> int:
    """How much of a pydantic location is a path in the file: unions and array items append parts of their own."""
    return 2 if place and str(place[0]) in section_models() else 1


def _complaint(place: tuple[str, ...], details: ErrorDetails) -> Complaint:
    path = ".".join(place)
    models = section_models()
    if details["type"] == "extra_forbidden":
        return _unknown(place, details["input"])
    section, _, name = path.rpartition(".")
    if not section and name in models:
        return Complaint(path, shown(details["input"]), f"a section [{name}]", f"Write its settings under a line [{name}].")
    field = models[section].model_fields[name]
    allowed = allowed_words(field)
    found = details["input"]
    literals = _literals(field.annotation)
    near = did_you_mean(found, literals) if isinstance(found, str) else ""
    remedy = f"Did you mean {shown(near)}?" if near else f"Set {path} to {allowed}."
    return Complaint(path, shown(found), allowed, remedy)


def _nearest(complaints: Sequence[Complaint]) -> frozenset[str]:
    """Paths that complaints about unknown settings suggest."""
    found = (_SUGGESTION.search(complaint.remedy) for complaint in complaints)
    return frozenset(match.group(1) for match in found if match)


def _unknown(place: tuple[str, ...], value: object) -> Complaint:
    models = section_models()
    section = place[0] if len(place) == 2 else ""
    name = place[-1]
    known = [*models[section].model_fields]
    path = ".".join(_quoted(part) for part in place)
    homes = [other for other, model in models.items() if other != section and name in model.model_fields]
    near = did_you_mean(name, known)
    if near:
        remedy = f"Unknown; did you mean {'.'.join([*place[:-1], near])}?"
    elif homes and tomltext.table(value) is None:
        remedy = (
            f"Unknown here; it belongs into [{homes[0]}]."
            if homes[0]
            else "Unknown here; it belongs to the top of the file, before the first section."
        )
    else:
        remedy = "Unknown; remove it."
    return Complaint(path, shown(value), ", ".join(known), remedy)


def _quoted(part: str) -> str:
    return part if len(part) <= 64 and part.isprintable() and part and not any(c in part for c in " .\"'") else shown(part)


def _without(document: Mapping[str, object], places: set[tuple[str, ...]]) -> dict[str, object]:
    cleaned: dict[str, object] = {}
    for key, value in document.items():
        if (key,) in places:
            continue
        table = tomltext.table(value)
        if table is not None and key in section_models():
            cleaned[key] = {inner: item for inner, item in table.items() if (key, inner) not in places}
        else:
            cleaned[key] = value
    return cleaned


def _given(document: Mapping[str, object]) -> frozenset[str]:
    """Dotted paths that the file sets itself."""
    paths: set[str] = set()
    for key, value in document.items():
        paths.add(key)
        table = tomltext.table(value)
        if table is not None:
            paths.update(f"{key}.{inner}" for inner in table)
    return frozenset(paths)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _literals(annotation: object) -> tuple[str, ...]:
    if typing.get_origin(annotation) is Literal:
        return tuple(str(value) for value in typing.get_args(annotation))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(word for part in typing.get_args(annotation) for word in _literals(part))
    return ()


def _allowed(annotation: object, bounds: str) -> str:
    literals = [word for word in _literals(annotation) if word]
    if literals:
        return ", ".join(literals)
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        # Only `X | None` and `X | ""` occur: the first part is what a person writes.
        return _allowed(parts[0], bounds)
    if typing.get_origin(annotation) is typing.Annotated:
        words = next((part.words for part in parts[1:] if isinstance(part, Words)), "")
        return words or _allowed(parts[0], bounds or _bounds(parts[1:]))
    word = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(typing.cast(type, annotation))
    if word is None:
        word = "an array of texts"
    return f"{word}{bounds}"


def _bounds(metadata: Sequence[object]) -> str:
    """Numeric bounds of annotated-types markers, as " from 1 to 1024" or " above 0 and below 1"."""
    parts: dict[str, object] = {}
    for marker in metadata:
        for name in ("ge", "gt", "le", "lt"):
            value = getattr(marker, name, None)
            if value is not None:
                parts[name] = value
    if "ge" in parts and "le" in parts:
        return f" from {parts['ge']} to {parts['le']}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and".join(f" {words[name]} {parts[name]}" for name in ("gt", "ge", "lt", "le") if name in parts)
