"""What is left of a pruned model: the kept units of each group as bits, in the numbers of the unpruned model.

A structure only ever shrinks: what has been cut out of a device's base is gone there. What a peer sends is checked against the layout
before it is used, and its length is known beforehand.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from fleetune.architectures import Group, Layout, TensorCut
from fleetune.errors import ModelError, WireError

FORMAT = 1
VERSION_MAX = (1 << 32) - 1
RANGES_CHARS_MAX = 1 << 23
"""Of one group in JSON: every other of the most neurons that a layer may have."""

_HEAD = struct.Struct("<4sBxxxII")
_MAGIC = b"FTST"
_RANGE = re.compile(r"([0-9]{1,8})(?:-([0-9]{1,8}))?", re.ASCII)


@dataclass(frozen=True)
class Structure:
    """`kept[g]` has bit u set where unit u of group g is kept. `version` grows with each change of a device's structure."""

    version: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Keep:
    """How much of a group to keep: `clusters` key/value heads with `each` query heads; or `clusters` neurons, `each` 1."""

    clusters: int
    each: int

    @property
    def units(self) -> int:
        return self.clusters * self.each


def whole(layout: Layout) -> Structure:
    """Nothing is cut."""
    return Structure(0, tuple((1 << group.units) - 1 for group in layout.groups))


def units(bits: int) -> list[int]:
    """The kept units, ascending.

    >>> units(0b1101)
    [0, 2, 3]
    """
    text = bin(bits)[:1:-1]
    return [place for place, bit in enumerate(text) if bit == "1"]


def bits_of(kept: Iterable[int]) -> int:
    """The inverse of `units`, in any order."""
    numbers = list(kept)
    # Written out and read once: setting bits one by one would copy the whole number each time.
    digits = bytearray(b"0" * (max(numbers, default=0) + 1))
    for unit in numbers:
        digits[-1 - unit] = ord("1")
    return int(digits, 2)


def count(bits: int) -> int:
    return bits.bit_count()


def kv_bits(group: Group, bits: int) -> int:
    """The key/value heads that are needed: those with a kept query head. For neurons the bits themselves."""
    if group.heads_per_kv == 1:
        return bits
    cluster = (1 << group.heads_per_kv) - 1
    return bits_of(kv for kv in range(group.kv_heads) if bits >> kv * group.heads_per_kv & cluster)


def keep_of(group: Group, bits: int) -> Keep:
    """How much of a group is kept; its bits must have been checked."""
    clusters = count(kv_bits(group, bits))
    return Keep(clusters, count(bits) // clusters)


def complaint(layout: Layout, structure: Structure) -> str | None:
    """Why these bits are no structure of this layout; None where they are."""
    if not 0 <= structure.version <= VERSION_MAX:
        return f"the version is {structure.version}, 0 to {VERSION_MAX} is allowed"
    if len(structure.kept) != len(layout.groups):
        return f"it has {len(structure.kept)} groups, the model has {len(layout.groups)}"
    for group, bits in zip(layout.groups, structure.kept, strict=True):
        if bits < 0 or bits.bit_length() > group.units:
            return f"{group.name} has units beyond its {group.units}"
        if bits == 0:
            return f"{group.name} keeps nothing, at least one is needed"
        if (uneven := _uneven(group, bits)) is not None:
            return uneven
    return None


def _uneven(group: Group, bits: int) -> str | None:
    if group.heads_per_kv == 1:
        return None
    cluster = (1 << group.heads_per_kv) - 1
    numbers = {count(bits >> kv * group.heads_per_kv & cluster) for kv in range(group.kv_heads)} - {0}
    if len(numbers) > 1:
        return f"{group.name} keeps {' and '.join(map(str, sorted(numbers)))} query heads per key/value head, equally many are needed"
    return None


def check(layout: Layout, structure: Structure) -> Structure:
    """The structure itself; ModelError where it does not fit the layout."""
    wrong = complaint(layout, structure)
    if wrong is not None:
        raise ModelError(f"The structure does not fit the {layout.model_type} model: {wrong}.", "Use a structure made for this base.")
    return structure


def nested(inner: Structure, outer: Structure) -> bool:
    """Whether `inner` keeps nothing that `outer` does not."""
    return len(inner.kept) == len(outer.kept) and all(not few & ~many for few, many in zip(inner.kept, outer.kept, strict=True))


def check_step(layout: Layout, before: Structure, after: Structure) -> Structure:
    """`after` itself; WireError unless it fits the layout, is nested in `before` and has its version, or a later one if it differs."""
    wrong = complaint(layout, after)
    if wrong is None and not nested(after, before):
        grown = [g.name for g, few, many in zip(layout.groups, after.kept, before.kept, strict=True) if few & ~many]
        wrong = f"{', '.join(grown[:3])} would keep units that were cut before version {before.version}"
    if wrong is None and (after.version < before.version or (after.version == before.version) != (after.kept == before.kept)):
        wrong = f"version {after.version} cannot follow version {before.version} {'unchanged' if after.kept == before.kept else 'changed'}"
    if wrong is not None:
        raise WireError(f"The structure is refused: {wrong}.", "The device fetches its base and its last acknowledged structure again.")
    return after


# ----------------------------------------------------------------------------------------------------------------- figures


def parameters(layout: Layout, structure: Structure) -> int:
    """Prunable parameters that are kept."""
    return sum(
        count(bits) * group.unit_parameters + count(kv_bits(group, bits)) * group.kv_parameters
        for group, bits in zip(layout.groups, structure.kept, strict=True)
    )


def sparsity(layout: Layout, structure: Structure) -> float:
    """The removed share of the prunable parameters, 0 to 1."""
    return 1.0 - parameters(layout, structure) / layout.prunable_parameters


def kept_elements(layout: Layout, structure: Structure, cut: TensorCut) -> list[int]:
    """Rows or columns, in the numbers of the unpruned tensor, that are kept of a tensor that is cut so."""
    group, bits = layout.groups[cut.group], structure.kept[cut.group]
    kept = units(kv_bits(group, bits) if cut.shared else bits)
    return [unit * cut.width + offset for unit in kept for offset in range(cut.width)]


# ---------------------------------------------------------------------------------------------------------------- choosing


def choose(layout: Layout, now: Structure, keeps: Sequence[Keep], scores: Sequence[Sequence[float]]) -> Structure:
    """The next structure: of each group the units with the highest scores, never more than there are now.

    `scores[g]` has a number for each unit of the unpruned group (those of cut units are not looked at). Of equal scores the lower
    number stays. Where a group keeps fewer key/value heads, whole clusters go; where it keeps fewer query heads, the same number goes
    from each cluster. The version grows by one if something goes.
    """
    kept = tuple(
        _choose(group, bits, keep, values) for group, bits, keep, values in zip(layout.groups, now.kept, keeps, scores, strict=True)
    )
    return now if kept == now.kept else Structure(now.version + 1, kept)


def _choose(group: Group, bits: int, keep: Keep, scores: Sequence[float]) -> int:
    present = keep_of(group, bits)
    clusters: dict[int, list[int]] = {}
    for unit in units(bits):
        clusters.setdefault(unit // group.heads_per_kv, []).append(unit)
    totals = {number: sum(scores[unit] for unit in members) for number, members in clusters.items()}
    chosen = _best(totals, max(1, min(keep.clusters, present.clusters)))
    each = max(1, min(keep.each, present.each))
    return bits_of(unit for number in chosen for unit in _best({member: scores[member] for member in clusters[number]}, each))


def _best(scores: Mapping[int, float], number: int) -> list[int]:
    return sorted(scores, key=lambda unit: (-scores[unit], unit))[:number]


# --------------------------------------------------------------------------------------------------------------- on the wire


def size_bytes(layout: Layout) -> int:
    """What `to_bytes` takes, for every structure of the layout."""
    return _HEAD.size + sum((group.units + 7) // 8 for group in layout.groups)


def to_bytes(layout: Layout, structure: Structure) -> bytes:
    """The one canonical form: head, then each group's bits, the lowest unit in the lowest bit of the first byte."""
    check(layout, structure)
    head = _HEAD.pack(_MAGIC, FORMAT, layout.fingerprint, structure.version)
    return head + b"".join(
        bits.to_bytes((group.units + 7) // 8, "little") for group, bits in zip(layout.groups, structure.kept, strict=True)
    )


def from_bytes(layout: Layout, data: bytes) -> Structure:
    """WireError unless the bytes are the canonical form of a structure of this layout."""
    if len(data) != size_bytes(layout):
        raise _refused(f"it has {len(data)} bytes, {size_bytes(layout)} are needed")
    magic, form, fingerprint, version = cast("tuple[bytes, int, int, int]", _HEAD.unpack_from(data))
    if (magic, form, fingerprint) != (_MAGIC, FORMAT, layout.fingerprint) or any(data[5:8]):
        raise _refused("it is of another model or another form")
    kept: list[int] = []
    place = _HEAD.size
    for group in layout.groups:
        length = (group.units + 7) // 8
        kept.append(int.from_bytes(data[place : place + length], "little"))
        place += length
    return _received(layout, Structure(version, tuple(kept)))


def to_json(layout: Layout, structure: Structure) -> dict[str, object]:
    """For files and for people: kept units as ranges of their numbers in the unpruned model."""
    check(layout, structure)
    return {
        "format": FORMAT,
        "model_type": layout.model_type,
        "version": structure.version,
        "groups": [
            {"name": group.name, "units": group.units, "kept": _ranges(bits)}
            for group, bits in zip(layout.groups, structure.kept, strict=True)
        ],
    }


def from_json(layout: Layout, value: object) -> Structure:
    """The inverse of `to_json`; WireError for anything else."""
    if not isinstance(value, dict):
        raise _refused("it is no JSON object")
    fields = cast("dict[str, object]", value)
    version, groups = fields.get("version"), fields.get("groups")
    if fields.get("format") != FORMAT or fields.get("model_type") != layout.model_type:
        raise _refused(f"it has the form {fields.get('format')!r} for {str(fields.get('model_type'))[:80]!r}")
    if not isinstance(version, int) or isinstance(version, bool) or not isinstance(groups, list):
        raise _refused("it lacks a version or groups")
    entries = cast("list[object]", groups)
    if len(entries) != len(layout.groups):
        raise _refused(f"it has {len(entries)} groups, the model has {len(layout.groups)}")
    kept = tuple(_kept(group, entry) for group, entry in zip(layout.groups, entries, strict=True))
    return _received(layout, Structure(version, kept))


def _kept(group: Group, entry: object) -> int:
    match entry:
        case {"name": group.name, "units": group.units, "kept": str() as text} if len(text) <= RANGES_CHARS_MAX:
            return _bits(group, text)
        case _:
            raise _refused(f"{group.name} with {group.units} units is expected in its place")


def _ranges(bits: int) -> str:
    """'0-2,5' for the units 0, 1, 2 and 5."""
    parts: list[str] = []
    first = last = -2
    for unit in [*units(bits), -2]:
        if unit == last + 1:
            last = unit
            continue
        if first >= 0:
            parts.append(str(first) if first == last else f"{first}-{last}")
        first = last = unit
    return ",".join(parts)


def _bits(group: Group, text: str) -> int:
    """Ranges in ascending order alone, so that there are never more of them than units."""
    kept: list[int] = []
    for part in text.split(",", group.units) if text else ():
        found = _RANGE.fullmatch(part)
        if found is None:
            raise _refused(f"{group.name} keeps {part[:40]!r}, which is no range of units")
        first, last = int(found[1]), int(found[2] or found[1])
        if not (kept[-1] if kept else -1) < first <= last < group.units:
            raise _refused(f"{group.name} keeps {part[:40]!r} of {group.units} units, in this place")
        kept += range(first, last + 1)
    return bits_of(kept)


def _received(layout: Layout, structure: Structure) -> Structure:
    wrong = complaint(layout, structure)
    if wrong is not None:
        raise _refused(wrong)
    return structure


def _refused(why: str) -> WireError:
    return WireError(f"The structure cannot be used: {why}.", "The device sends its structure anew, or fetches its base again.")
