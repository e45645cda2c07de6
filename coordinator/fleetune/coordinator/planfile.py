"""A fleet.json becomes a planning problem, or every complaint about it at once."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fleetune.complaints import Complaint, ComplaintsError, did_you_mean, shown
from fleetune.errors import ConfigError

if TYPE_CHECKING:
    from fleetune.coordinator.planner.problem import Fleet, ResourceKind

FILE_BYTES_MAX = 32 << 20
DEVICES_MAX = 10_000
BLOCKS_MAX = 1_000
PAIRS_MAX = 1_000_000
NAME_CHARACTERS_MAX = 128
COMPLAINTS_MAX = 200

SECONDS_MAX = 1e9
NUMBER_MIN = 1e-9
NUMBER_MAX = 1e15

# What a file of the greatest allowed fleet holds, and then some: a bomb of brackets or commas is refused before it is parsed.
_CONTAINERS_MAX = 4 * DEVICES_MAX
_COMMAS_MAX = 3 * PAIRS_MAX

_KINDS = ("bit/s", "hz", "airtime")
_TOP = ("resource", "blocks", "devices")
_RESOURCE = ("total", "kind")
_BLOCK = ("name", "payload_bits", "rounds_since_trained")
_DEVICE = ("name", "ready_seconds", "fits", "bits_per_unit", "max_share", "snr_hz")

_AMOUNT = f"0, or a number from {NUMBER_MIN:g} to {NUMBER_MAX:g}"
_SECONDS = f"a number of seconds from 0 to {SECONDS_MAX:g}"


class FleetFileError(ComplaintsError):
    """A fleet file that cannot be planned; `complaints` holds every reason, each with its JSON path."""

    def __init__(self, complaints: Sequence[Complaint]) -> None:
        super().__init__("the fleet file", list(complaints)[:COMPLAINTS_MAX])


def load(file: Path) -> Fleet:
    """The problem in a file. Raises FleetFileError, and ConfigError where the file cannot be read."""
    try:
        with file.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the fleet file {file}: {error.strerror}.") from error
    return parse(content)


def parse(content: bytes) -> Fleet:
    """The problem in the bytes of a file. Raises FleetFileError with all complaints."""
    document = _document(content)
    reader = _Reader([])
    draft = _draft(reader, document)
    if reader.complaints or draft is None:
        raise FleetFileError(reader.complaints)
    return draft()


class _Object(dict[str, object]):
    """A JSON object that remembers which of its names stand twice."""

    twice: tuple[str, ...] = ()


def _object(pairs: Sequence[tuple[str, object]]) -> _Object:
    made = _Object(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        made.twice = tuple(name for name in made if counts[name] > 1)
    return made


def _document(content: bytes) -> object:
    if len(content) > FILE_BYTES_MAX:
        allowed = f"{FILE_BYTES_MAX >> 20} MiB at the most"
        raise FleetFileError([Complaint("", "", allowed, "Plan fewer devices, or write fewer digits.")])
    containers, commas = content.count(b"[") + content.count(b"{"), content.count(b",")
    if containers > _CONTAINERS_MAX or commas > _COMMAS_MAX:
        found = f"{containers} arrays and objects, {commas} commas"
        raise FleetFileError([Complaint("", found, _pairs_words(), "Plan fewer devices or blocks.")])
    try:
        return cast("object", json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object))
    except UnicodeDecodeError as error:
        reason = f"The byte at offset {error.start} is not UTF-8; save the file as UTF-8."
    except json.JSONDecodeError as error:
        reason = f"Line {error.lineno}, column {error.colno}: {error.msg}."
    except ValueError:
        reason = "It holds a whole number of thousands of digits; write it shorter."
    except RecursionError:
        reason = "It is nested too deeply; four levels are enough for a fleet."
    raise FleetFileError([Complaint("", "", "one JSON object", reason)])


def _pairs_words() -> str:
    return f"up to {DEVICES_MAX} devices, {BLOCKS_MAX} blocks and {PAIRS_MAX} pairs of both"


@dataclass
class _Reader:
    """Takes values out of the document; what is wrong becomes a complaint, and a harmless value stands in for it."""

    complaints: list[Complaint]

    def wrong(self, path: str, value: object, allowed: str, remedy: str) -> None:
        # More than is shown is not worth the memory.
        if len(self.complaints) < COMPLAINTS_MAX:
            self.complaints.append(Complaint(path, "" if value is _MISSING else shown(value), allowed, remedy))

    def table(self, path: str, value: object, known: Sequence[str], required: Sequence[str]) -> Mapping[str, object] | None:
        """An object whose names are all known, or None."""
        if not isinstance(value, _Object):
            self.wrong(path, value, f"an object with {', '.join(known)}", "Write an object in braces.")
            return None
        for name in value.twice:
            self.wrong(_under(path, name), _MISSING, "each name once", "The name stands twice in this object; remove one.")
        for name in value:
            if name not in known:
                near = did_you_mean(name, known)
                self.wrong(_under(path, name), value[name], "", f"Unknown; did you mean {near}?" if near else "Unknown; remove it.")
        for name in required:
            if name not in value:
                self.wrong(_under(path, name), _MISSING, "", "It is missing; docs/planner.md describes the file.")
        return value

    def items(self, path: str, value: object, most: int) -> list[object] | None:
        if not isinstance(value, list):
            self.wrong(path, value, f"an array of up to {most}", "Write an array in brackets.")
            return None
        found = cast("list[object]", value)
        if len(found) > most:
            self.wrong(path, f"{len(found)} items", f"{most} at the most", "Plan fewer at a time.")
            return None
        return found

    def amount(self, path: str, value: object, *, low: float = NUMBER_MIN, high: float = NUMBER_MAX, allowed: str = _AMOUNT) -> float:
        """0 or a number between the bounds."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.wrong(path, value, allowed, "Write a number.")
        elif value != 0 and not low <= value <= high:  # NaN is outside of everything
            remedy = "It has to be finite." if isinstance(value, float) and not math.isfinite(value) else "It is out of range."
            self.wrong(path, value, allowed, remedy)
        else:
            return float(value)
        return 0.0

    def names(self, paths: Iterable[str], values: Sequence[object], what: str) -> list[str]:
        """Names of one kind, each once."""
        first: dict[str, str] = {}
        found: list[str] = []
        for path, value in zip(paths, values, strict=True):
            if value is _MISSING:
                continue
            allowed = f"1 to {NAME_CHARACTERS_MAX} printable characters"
            if not isinstance(value, str) or not 1 <= len(value) <= NAME_CHARACTERS_MAX or not value.isprintable():
                self.wrong(path, value, allowed, f"Give the {what} a name.")
            elif value in first:
                self.wrong(path, value, "a name of its own", f"{first[value]} has the same name; rename one.")
            else:
                first[value] = path
                found.append(value)
        return found

    def row(self, path: str, value: object, count: int | None, read: Callable[[str, object], float]) -> list[float]:
        """One value for each block; `count` is None where the blocks themselves are wrong."""
        found = self.items(path, value, BLOCKS_MAX)
        if found is None:
            return []
        if count is not None and len(found) != count:
            self.wrong(path, f"{len(found)} items", f"{count}, one for each block", "Match it with blocks, which is in depth order.")
        return [read(f"{path}[{index}]", item) for index, item in enumerate(found)]

    def seconds(self, path: str, value: object) -> float:
        return self.amount(path, value, low=0.0, high=SECONDS_MAX, allowed=_SECONDS)

    def flag(self, path: str, value: object) -> float:
        if not isinstance(value, bool):
            self.wrong(path, value, "true or false", "Say whether the block fits into the device's memory.")
        return 1.0 if value is True else 0.0


class _Missing:
    """Stands for a value that is not there, as null is a value."""


_MISSING = _Missing()


def _under(path: str, name: str) -> str:
    plain = name.isidentifier() and len(name) <= NAME_CHARACTERS_MAX
    if not plain:
        return f"{path}[{shown(name)}]"
    return f"{path}.{name}" if path else name


def _draft(reader: _Reader, document: object) -> Callable[[], Fleet] | None:
    top = reader.table("", document, _TOP, _TOP)
    if top is None:
        return None
    total, kind = _resource(reader, top.get("resource", _MISSING))
    blocks = _blocks(reader, top.get("blocks", _MISSING))
    count = None if blocks is None else len(blocks.names)
    devices = _devices(reader, top.get("devices", _MISSING), count)
    if blocks is None or devices is None:
        return None

    def made() -> Fleet:
        import numpy as np

        from fleetune.coordinator.planner.problem import Fleet

        shape = (len(devices.names), len(blocks.names))
        return Fleet(
            blocks=tuple(blocks.names),
            devices=tuple(devices.names),
            ready_s=np.reshape(np.array(devices.ready_s, dtype=np.float64), shape),
            fits=np.reshape(np.array(devices.fits, dtype=np.bool_), shape),
            payload_bits=np.array(blocks.payload_bits, dtype=np.float64),
            bits_per_unit=np.array(devices.bits_per_unit, dtype=np.float64),
            snr_hz=np.array(devices.snr_hz, dtype=np.float64),
            max_share=np.array(devices.max_share, dtype=np.float64),
            rounds_since_trained=np.array(blocks.rounds_since_trained, dtype=np.float64),
            total=total,
            kind=kind,
        )

    return made


def _resource(reader: _Reader, value: object) -> tuple[float, ResourceKind]:
    table = None if value is _MISSING else reader.table("resource", value, _RESOURCE, _RESOURCE)
    if table is None:
        return 0.0, "bit/s"
    total = reader.amount("resource.total", table["total"]) if "total" in table else 0.0
    kind = table.get("kind", "bit/s")
    if kind not in _KINDS:
        reader.wrong("resource.kind", kind, ", ".join(_KINDS), "It says what total and the shares are counted in.")
    return total, cast("ResourceKind", kind)


@dataclass
class _Blocks:
    names: list[str]
    payload_bits: list[float]
    rounds_since_trained: list[float]


def _blocks(reader: _Reader, value: object) -> _Blocks | None:
    found = None if value is _MISSING else reader.items("blocks", value, BLOCKS_MAX)
    if found is None:
        return None
    blocks = _Blocks([], [], [])
    names: list[object] = []
    for index, item in enumerate(found):
        path = f"blocks[{index}]"
        table: Mapping[str, object] = reader.table(path, item, _BLOCK, _BLOCK[:2]) or {}
        names.append(table.get("name", _MISSING))
        blocks.payload_bits.append(reader.amount(f"{path}.payload_bits", table.get("payload_bits", 0)))
        waited = table.get("rounds_since_trained", 0)
        blocks.rounds_since_trained.append(reader.amount(f"{path}.rounds_since_trained", waited))
    blocks.names = reader.names((f"blocks[{index}].name" for index in range(len(found))), names, "block")
    # One that has no valid name still takes its place in the devices' rows.
    blocks.names += [""] * (len(found) - len(blocks.names))
    return blocks


@dataclass
class _Devices:
    names: list[str]
    ready_s: list[list[float]]
    fits: list[list[float]]
    bits_per_unit: list[float]
    max_share: list[float]
    snr_hz: list[float]


def _devices(reader: _Reader, value: object, block_count: int | None) -> _Devices | None:
    found = None if value is _MISSING else reader.items("devices", value, DEVICES_MAX)
    if found is None:
        return None
    if block_count is not None and len(found) * block_count > PAIRS_MAX:
        reader.wrong("devices", f"{len(found)} devices for {block_count} blocks", _pairs_words(), "Plan fewer at a time.")
        return None
    devices = _Devices([], [], [], [], [], [])
    names: list[object] = []
    for index, item in enumerate(found):
        path = f"devices[{index}]"
        radio = isinstance(item, _Object) and item.get("snr_hz") is not None
        table: Mapping[str, object] = reader.table(path, item, _DEVICE, _DEVICE[:3] if radio else _DEVICE[:4]) or {}
        names.append(table.get("name", _MISSING))
        ready, fits = table.get("ready_seconds", []), table.get("fits", [])
        devices.ready_s.append(reader.row(f"{path}.ready_seconds", ready, _given(table, 1, block_count), reader.seconds))
        devices.fits.append(reader.row(f"{path}.fits", fits, _given(table, 2, block_count), reader.flag))
        devices.bits_per_unit.append(reader.amount(f"{path}.bits_per_unit", table.get("bits_per_unit", 0)))
        most = table.get("max_share")
        devices.max_share.append(math.inf if most is None else reader.amount(f"{path}.max_share", most, allowed=f"null, {_AMOUNT}"))
        snr = table.get("snr_hz")
        devices.snr_hz.append(math.nan if snr is None else reader.amount(f"{path}.snr_hz", snr, allowed=f"null, {_AMOUNT}"))
    devices.names = reader.names((f"devices[{index}].name" for index in range(len(found))), names, "device")
    return devices


def _given(table: Mapping[str, object], place: int, block_count: int | None) -> int | None:
    """How long a row has to be; a missing one has been complained about."""
    return block_count if _DEVICE[place] in table else None
