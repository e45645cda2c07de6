"""Messages of the wire as plain JSON values for `--json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def message_json(message: Message) -> dict[str, Json]:
    """Every field by its name in the .proto: enums as lower-case words, 64-bit integers as numbers, bytes left out.

    Unlike protobuf's own JSON, an unset field stands there with its zero or null, so that scripts need no defaults, and a
    list of metrics becomes one object.
    """
    fields = cast("Sequence[FieldDescriptor]", message.DESCRIPTOR.fields)
    return {field.name: _field_json(message, field) for field in fields if field.type != field.TYPE_BYTES}


def _field_json(message: Message, field: FieldDescriptor) -> Json:
    value = cast("object", getattr(message, field.name))
    if field.is_repeated:
        items = list(cast("list[object]", value))
        if field.message_type is not None and field.message_type.full_name == "fleetune.v1.Metric":
            return {str(getattr(item, "name")): _number(float(getattr(item, "value"))) for item in items}  # noqa: B009
        return [_value_json(item, field) for item in items]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value_json(value, field)


def _value_json(value: object, field: FieldDescriptor) -> Json:
    if field.message_type is not None:
        return message_json(cast("Message", value))
    if field.enum_type is not None:
        return enum_word(field.enum_type.name, field.enum_type.values_by_number[cast("int", value)].name)
    if isinstance(value, float):
        return _number(value)
    return cast("Json", value)


def enum_word(enum_name: str, value_name: str) -> str:
    """("JobState", "JOB_STATE_RUNNING") -> "running"; the zero value is "unspecified"."""
    prefix = "".join(f"_{letter}" if letter.isupper() else letter.upper() for letter in enum_name).lstrip("_").upper() + "_"
    return value_name.removeprefix(prefix).lower()


def _number(value: float) -> Json:
    # JSON has neither NaN nor Infinity.
    return value if math.isfinite(value) else None
