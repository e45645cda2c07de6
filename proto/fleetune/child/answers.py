"""A line from a child: an event, a result or an error of the running request, or none of these.

The child runs our code on other people's models and rows, so its lines are read as anything from outside is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from fleetune.errors import WireError


@dataclass(frozen=True)
class Event:
    """Progress or a log line; all fields of the line."""

    fields: Mapping[str, object]


@dataclass(frozen=True)
class Result:
    fields: dict[str, object]


@dataclass(frozen=True)
class Error:
    kind: str
    stage: str
    message: str
    traceback: str


Answer = Event | Result | Error


def read(line: bytes, request_id: int) -> Answer | None:
    """What a line says of a request; None where it belongs to another one. WireError for what is no answer."""
    try:
        parsed: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"The child process sent a line that is no JSON: {line[:80]!r}.") from error
    if not isinstance(parsed, dict):
        raise WireError(f"The child process sent a {type(parsed).__name__}; an object is needed.")
    answer = cast("dict[str, object]", parsed)
    if answer.get("id") != request_id:
        return None
    if "result" in answer:
        return Result(_object(answer["result"], "result"))
    if "error" in answer:
        error_ = _object(answer["error"], "error")
        return Error(*(_text(error_.get(key), default) for key, default in _ERROR_FIELDS))
    return Event(answer)


_ERROR_FIELDS = (("kind", "internal"), ("stage", ""), ("message", ""), ("traceback", ""))


def _text(value: object, default: str) -> str:
    return value if isinstance(value, str) else default


def _object(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise WireError(f"The child process sent a {what} that is a {type(value).__name__}; an object is needed.")
    return cast("dict[str, object]", value)
